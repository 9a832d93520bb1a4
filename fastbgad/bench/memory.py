"""How much memory a call takes at its peak, on a GPU or, on Linux, in this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..ops import reused_memory

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): the peak resident set starts again at the current one
# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Allocations from this size on are pages of their own while memory is measured. The largest that glibc comes to by
# itself is where it stands afterwards.
_MEASURED_THRESHOLD, _LARGEST_THRESHOLD = 128 << 10, 32 << 20
_SMALLEST_HOLE = 1 << 20


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that `call` holds at one time, beyond what was held before it.

    It is called once; what the first call of a kind makes for good (tables, workspaces, compiled kernels) counts, so
    call it once before to leave that out. On a GPU the tensors of this process are counted; on a CPU the resident
    memory of the whole process, other threads included, in pages. Blocks of less than 1 MiB may count to the end of
    the call when they are freed before.

    Args:
        call: the work to measure; its result is dropped.
        device: where the work runs.

    Returns:
        Bytes, at least 0; None where it cannot be told: a CPU without Linux's /proc, another kind of device.
    """
    # What lies idle would be used again unseen, or freed in the middle.
    gc.collect()
    reused_memory.release()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    if device.type != "cpu" or not _CLEAR_REFS.exists():
        call()
        return None
    with _freed_blocks_go_back():
        if not _reset_peak():
            call()
            return None
        resident = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - resident)


class _MallocInfo(ctypes.Structure):
    """mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    )  # fmt: skip


@contextlib.contextmanager
def _freed_blocks_go_back() -> Iterator[None]:
    """Hand free memory back to the system, and make large blocks go back when they are freed.

    Memory that the C library keeps after a free is resident and would hide the allocation that takes it again. And
    glibc takes an allocation, however large, out of free room inside its heap if it fits there; a block that is freed
    there stays resident, and so does one below a threshold that grows with what is freed. The peak would then hold
    blocks that were freed before it, more or fewer depending on what the process did before the call. So the call
    finds the threshold low, and the free room taken by blocks that are never touched.

    The second half needs glibc 2.33. What another C library keeps is not known.
    """
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        libc.malloc_trim(0)
    try:
        libc.mallinfo2.restype = _MallocInfo
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
        libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
        libc.mallopt(_M_MMAP_THRESHOLD, _MEASURED_THRESHOLD)
    except AttributeError:
        yield
        return
    holes = list[int]()
    try:
        size = libc.mallinfo2().fordblks  # all free room
        while size >= _SMALLEST_HOLE:
            free = libc.mallinfo2().fordblks
            block = libc.malloc(size)
            if free - libc.mallinfo2().fordblks >= size:
                holes.append(block)
            else:  # no hole is as large, and the block is not in the heap
                libc.free(block)
                size //= 2
        yield
    finally:
        for block in holes:
            libc.free(block)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)


def _reset_peak() -> bool:
    """Make the system's record of the peak start again; False where there is none."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        return _status_bytes("VmHWM") > 0
    except OSError:
        return False


def _status_bytes(name: str) -> int:
    """A figure of /proc/self/status in bytes; 0 if the system does not tell it."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
