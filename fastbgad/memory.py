"""How much memory a call takes at its peak, on a GPU or, on Linux, in this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from .ops import reused_memory

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): the peak resident set starts again at the current one


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that `call` holds at one time, beyond what was held before it.

    It is called once; what the first call of a kind makes for good (tables, workspaces, compiled kernels) counts, so
    call it once before to leave that out. On a GPU the tensors of this process are counted; on a CPU the resident
    memory of the whole process, other threads included, in pages.

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
    if device.type != "cpu" or not _reset_peak():
        call()
        return None
    resident = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - resident)


def _reset_peak() -> bool:
    """Hands free memory back to the system and lets its record of the peak start anew; False where there is none."""
    # Memory that the C library keeps after a free is resident and would hide the allocation that takes it again. Where
    # it is not glibc, what it keeps is not known.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
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
