"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Kernels are interpreted where there is no GPU to run them. Triton reads this when a kernel is defined, so it is set
# before any test imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread everywhere: a test's arithmetic does not depend on the cores, and small operations run faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
