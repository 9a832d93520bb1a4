"""Peak memory of a call, on a GPU or, on Linux, in this process."""

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
# While memory is measured, larger allocations get pages of their own. Afterwards the threshold is the largest that
# glibc reaches by itself.
_MEASURED_THRESHOLD, _LARGEST_THRESHOLD = 128 << 10, 32 << 20
_SMALLEST_HOLE = 1 << 20


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the largest number of bytes that `call` holds at one time, beyond those held before it.

    It is called once. Memory that a first call allocates for good (tables, workspaces, compiled kernels) counts, so
    call it once before to leave that out. On a GPU the tensors of this process are counted; on a CPU the resident
    memory of the whole process, other threads included, in pages. Blocks of less than 1 MiB may count to the end of
    the call when they are freed before.

    Args:
        call: the work to measure; its result is dropped.
        device: where the work runs.

    Returns:
        Bytes, at least 0; None where that is unknown: a CPU without Linux's /proc, another kind of device.
    """
    # Idle memory would be reused unseen, or freed in the middle.
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
    with _freed_blocks_returned():
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
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


@contextlib.contextmanager
def _freed_blocks_returned() -> Iterator[None]:
    """Return free memory to the system, and make the C library return large blocks when they are freed.

    Memory that the C library keeps after a free is resident and would hide the allocation that reuses it. Further,
    glibc serves an allocation of any size from free space inside its heap if it fits there; a block that is freed there
    stays resident, and so does one below a threshold that grows with what is freed. The peak would then include blocks
    that were freed before it, depending on what the process did before the call. Therefore the threshold is low during
    the call, and the free space is allocated as blocks that are never touched.

    The second half needs glibc 2.33. The behavior of other C libraries is not known.
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
        size = libc.mallinfo2().fordblks  # all free space
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
    """Reset the system's record of the peak; return False where there is none."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        return _status_bytes("VmHWM") > 0
    except OSError:
        return False


def _status_bytes(name: str) -> int:
    """Return a figure of /proc/self/status in bytes, 0 if it is not there."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
