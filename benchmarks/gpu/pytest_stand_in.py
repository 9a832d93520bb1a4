"""A pytest plugin: every kernel that a test launches is compiled for a GPU as its launch asks for, and does not run.

    python -O -m pytest --assert=plain -p benchmarks.gpu.pytest_stand_in tests/ops/boundary/test_registered.py

Outputs hold whatever was in memory, so nothing may be asserted: -O and --assert=plain leave the assertions out. What
counts is in the file that LOG names (in the environment): a line of JSON for every launch's kernel, and one for every
kernel that cannot be compiled or launched.
"""

from __future__ import annotations

import json
import os
from typing import Any

from . import carried, stand_in_driver

LOG = "FASTBGAD_STAND_IN_LOG"


def pytest_configure() -> None:
    """Install the driver, before any test imports a kernel, and watch all launches."""
    path = os.environ.get(LOG)
    log = open(path, "a", buffering=1) if path else None  # noqa: SIM115 (until the process ends)

    def write(**entry: Any) -> None:
        if log is not None:
            log.write(json.dumps({"test": os.environ.get("PYTEST_CURRENT_TEST", ""), **entry}) + "\n")

    def launched(launch: stand_in_driver.Launch) -> None:
        write(launched=launch.kernel, digest=launch.digest)

    def compiled(compilation: stand_in_driver.Compilation) -> None:
        carried.mark_used(compilation.digest)
        write(compiled=compilation.kernel, hit=compilation.cache_hit, seconds=compilation.seconds)

    stand_in_driver.install(launched, compiled)

    from triton import JITFunction

    from fastbgad.kernels import tile_sizes

    run = JITFunction.run

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return run(self, *arguments, **options)
        except Exception as error:
            write(failed=self.__name__, problem=f"{type(error).__name__}: {error}"[-2000:])
            raise

    JITFunction.run = watched
    # Tests that run in the interpreter choose tiles that suit it; these kernels have the tiles that ship.
    tile_sizes.use_tiles = lambda path: None
