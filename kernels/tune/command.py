"""Find the fastest tile sizes of every kernel on this GPU and store them where the kernels look for them.

    python -m fastbgad.kernels.tune                                  # all kernels, into the package's configs folder
    python -m fastbgad.kernels.tune --kernel flow --out my_gpu.json

Every candidate's outputs are first compared with those of the default tiles; one that differs, or that this GPU cannot
launch, is refused with its reason. The others are measured in turns, so that a change of the clock affects all of them.
To use a file outside the configs folder, call `fastbgad.kernels.tile_sizes.use_tiles(path)`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..tile_sizes import CONFIGS, TilesError, slug
from ..triton_version import triton_version, why_not_this_triton
from ..variants import MODULES
from .cases import collect, tune
from .measuring import graph_stopwatch
from .precompiling import Precompiling
from .results import describe_machine, result_table, store


def require_writable(path: Path) -> None:
    """Raise `TilesError` where the file cannot be written, before minutes of measuring."""
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise TilesError(f"cannot write {path}: {error.strerror}; name another file with --out FILE") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 tuned, 2 cannot tune here."""
    parser = argparse.ArgumentParser(
        prog="python -m fastbgad.kernels.tune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--kernel", nargs="+", choices=MODULES, default=list(MODULES), metavar="NAME", help=", ".join(MODULES)
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write; default: configs/<gpu>.json in the package"
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="measurements of each candidate (20)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), metavar="T", help="begin no case after this time"
    )
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (TilesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise TilesError("--rounds must be at least 1")
    if obstacle := why_not_this_triton(triton_version()):
        raise TilesError(obstacle)
    import triton  # not at the top: where it is missing, the line above says what to do

    if not torch.cuda.is_available():
        raise TilesError("tuning measures the kernels on the GPU they will run on, and there is no CUDA GPU here")
    if triton.knobs.runtime.interpret:
        raise TilesError("TRITON_INTERPRET is set, so kernels are interpreted, not compiled; unset it")
    device = torch.device("cuda", torch.cuda.current_device())
    out = options.out or CONFIGS / f"{slug(torch.cuda.get_device_name(device))}.json"
    require_writable(out)
    cases = collect(options.kernel)
    print(f"tuning {len(cases)} entries for {torch.cuda.get_device_name(device)} into {out}")
    machine = describe_machine(device)
    compiling = Precompiling(options.kernel, min(12, len(os.sched_getaffinity(0))))
    try:
        results = tune(
            cases,
            device,
            graph_stopwatch,
            rounds=options.rounds,
            seconds=options.seconds,
            keep=lambda result: store(out, [result], machine),
            before=compiling.run,
        )
    finally:
        compiling.close()
    print(result_table(results))
    return 0
