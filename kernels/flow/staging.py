"""Memory for wide rows (BK > 0), which visit the registers but do not stay there: their state and their operands.

Each program has memory of its own, which stays in the cache, and takes several tiles in turn. The memory is therefore
bounded by the size of the GPU and not by the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that share a multiprocessor where rows are staged in memory; more would push each other out of the cache.
PROGRAMS_PER_MULTIPROCESSOR = 2


@triton.jit
def program_memory(
    stage_ptr,  # [programs, S, BM, 2 * K] operand
    state_ptr,  # [programs, BM, 2 * K] float32
    BM: tl.constexpr,
    K: tl.constexpr,
):
    """Return this program's part of the stage, and pointers to the first half of its state, [BM, K]."""
    PARTS: tl.constexpr = 1 + (stage_ptr.dtype.element_ty == tl.float16)
    stage_ptr += tl.program_id(0).to(tl.int64) * (BM * 2 * K * PARTS)
    state_ptr += tl.program_id(0).to(tl.int64) * (BM * 2 * K)
    return stage_ptr, state_ptr + (tl.arange(0, BM)[:, None] * (2 * K) + tl.arange(0, K)[None, :])


def staging(
    blocks: int, k: int, tiles: Mapping[str, int], operand: torch.dtype, device: torch.device
) -> tuple[int, Tensor, Tensor]:
    """Return the number of programs for this many tiles of rows, and the memory of their stage and state."""
    if not tiles["BK"]:
        nothing = torch.empty(0, dtype=operand, device=device)
        return blocks, nothing, nothing.float()
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs = min(blocks, PROGRAMS_PER_MULTIPROCESSOR * processors)
    parts = 2 if operand == torch.float16 else 1
    stage = torch.empty(programs, parts, tiles["BM"], 2 * k, dtype=operand, device=device)
    return programs, stage, torch.empty(programs, tiles["BM"], 2 * k, dtype=torch.float32, device=device)
