"""Fixtures shared by all tests."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent

# Kernels are interpreted where there is no GPU to run them. Triton reads this when a kernel is defined, so it is set
# before any test imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# The files that take longest, the longest first: begun last, one of them would keep one worker busy after the others.
LONGEST = (
    "kernels/test_resources.py",
    "benchmarks/gpu/test_stand_in.py",
    "ops/flow/test_registered.py",
    "predict/test_ray.py",
    "experiments/test_all_tables.py",
    "benchmarks/gpu/test_command.py",
    "convert/test_conversion.py",
    "export/test_detector.py",
    "cli/test_bench.py",
    "test_examples.py",
    "compat/anomalib/test_lightning_model.py",
    "experiments/peers/test_peers.py",
    "ops/flow/test_wide.py",
    "cli/test_reproduce.py",
    "backbones/test_packaged.py",
    "train/test_data_parallel.py",
    "bench/test_memory.py",
    "kernels/test_triton_version.py",
    "backbones/test_timm_features.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs kernels, which is whoever asks for `device`; put the longest files first."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.interpreter)
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread everywhere: a test's arithmetic does not depend on the cores, and small operations run faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_idle_overflow_checks() -> None:
    """Leave out what Triton's interpreter computes around every integer operation and then throws away.

    It looks for overflow, and reports it only with `debug`, which is off: a third of its time and nothing found.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        builder = interpreter.interpreter_builder
        if builder.options.sanitize_overflow and not builder.options.debug:
            builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every uninitialised buffer holds NaN, so a place that is never written shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: on the GPU if there is one, else through the interpreter on CPU tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def interpreter_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under the interpreter every operation costs the same whatever its size, so its tiles of the flow are large.

    Which rows are staged in memory (BK) stays as it ships.
    """
    from fastbgad.kernels.tile_sizes import default_tiles

    tiles = {
        kernel: {key: {**sizes, "BM": 256 if "weight" in kernel else 64, "BH": 64} for key, sizes in entries.items()}
        for kernel, entries in default_tiles().items()
        if kernel.startswith("flow")
    }
    path = tmp_path_factory.mktemp("tiles") / "interpreter.json"
    path.write_text(json.dumps({"tiles": tiles}))
    return path


@pytest.fixture
def large_tiles(interpreter_tiles: Path, device: torch.device) -> Iterator[None]:
    """The flow's kernels with `interpreter_tiles`; on a GPU with the tiles that ship."""
    from fastbgad.kernels.tile_sizes import use_tiles

    use_tiles(interpreter_tiles if device.type == "cpu" else None)
    yield
    use_tiles(None)
