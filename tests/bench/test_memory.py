"""Peak memory of a call: what it holds for a moment is seen, what was free or held before is not counted."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from fastbgad.bench import memory
from fastbgad.bench.memory import peak_bytes
from fastbgad.ops import reused_memory

CPU = torch.device("cpu")
MIB = 2**20
# Pages of code that the first call of a kind reads, and what the allocator rounds up to.
TOLERANCE = 4 * MIB

needs_proc = pytest.mark.skipif(not memory._reset_peak(), reason="this system does not tell peaks of memory")


def hold(*mebibytes: int) -> None:
    """Holds the last two of these blocks at a time."""
    block = torch.empty(0)
    for number in mebibytes:
        block = torch.ones(number * MIB, dtype=torch.uint8)
    del block


@needs_proc
@pytest.mark.parametrize("mebibytes", [16, 96])
def test_what_a_call_allocates_is_seen(mebibytes: int) -> None:
    hold(1)
    assert peak_bytes(lambda: hold(mebibytes), CPU) == pytest.approx(mebibytes * MIB, abs=TOLERANCE)
    # The result itself counts, and the next call starts anew.
    assert peak_bytes(lambda: torch.ones(8 * MIB, dtype=torch.uint8), CPU) == pytest.approx(8 * MIB, abs=TOLERANCE)
    assert peak_bytes(lambda: None, CPU) < TOLERANCE


def glibc_tells_its_holes() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")


def leave_holes() -> torch.Tensor:
    """Free 600 MiB inside glibc's heap, below what is returned; all blocks are then taken from there."""
    for mebibytes in (1, 8, 31):  # mapped one by one at first, until the freed ones have raised the threshold
        hold(mebibytes)
    blocks = [torch.empty(30 * MIB, dtype=torch.uint8) for _ in range(20)]
    return torch.cat([torch.ones(MIB // 2, dtype=torch.uint8), blocks[0][:1]])


@needs_proc
@pytest.mark.skipif(not glibc_tells_its_holes(), reason="needs glibc 2.33")
@pytest.mark.parametrize("mebibytes", [8, 24, 48])
@pytest.mark.parametrize("holes", [False, True])
def test_the_peak_is_that_of_one_moment(mebibytes: int, holes: bool) -> None:
    """Whatever the process did before."""
    kept = leave_holes() if holes else None
    most = pytest.approx(2 * mebibytes * MIB, abs=TOLERANCE)
    for _ in range(2):
        assert peak_bytes(lambda: hold(*[mebibytes] * 5), CPU) == most
    held = torch.ones(mebibytes * MIB, dtype=torch.uint8)
    assert peak_bytes(lambda: held.max(), CPU) < TOLERANCE
    del kept


@needs_proc
def test_idle_blocks_are_not_free_memory() -> None:
    """A block that the flow keeps for its next call would hide what that call needs."""

    def take() -> None:
        reused_memory.Block(24 * MIB, torch.empty(0)).tensor.fill_(1.0)

    take()
    assert reused_memory._idle
    assert peak_bytes(take, CPU) == pytest.approx(96 * MIB, abs=TOLERANCE)


def test_release_leaves_nothing_behind() -> None:
    reused_memory.Block(1000, torch.empty(0))
    used = reused_memory.Block(1000, torch.empty(0))
    reused_memory.release()
    assert not reused_memory._idle
    where = used.tensor.data_ptr()
    del used
    assert [block.data_ptr() for block in reused_memory._idle] == [where]
    reused_memory.release()


def test_where_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The work is done all the same."""
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
    calls: list[int] = []
    assert peak_bytes(lambda: calls.append(1), CPU) is None
    assert peak_bytes(lambda: calls.append(2), torch.device("meta")) is None
    assert calls == [1, 2]


def test_an_error_is_passed_on() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        peak_bytes(fail, CPU)
