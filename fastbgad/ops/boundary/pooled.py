"""The boundary over the rows of several processes, without gathering them and without knowing how many each holds.

Radix selection: all processes count the digits of their rows that are still in question, add the 256 counts up and
choose the same digit, from the top digit to the last. What travels is one int64 [256] per digit (four of them for
float32), whatever the number of rows; no process waits for its own device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def pooled_boundary_triton(
    lp: Tensor,  # [N] float32
    anomalous: Tensor,  # [N] bool
    beta: float,
    tau: float,
    normalizer: float,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return b_n, b_a and n_normal of all processes' rows, by the kernels."""
    from ...kernels.boundary import boundary_finish, boundary_histograms  # triton need not be installed

    check_member(group)
    with torch.cuda.device_of(lp):
        histograms = boundary_histograms(
            lp.contiguous(), anomalous.contiguous(), beta, reduce=lambda counts: _add_up(counts, group)
        )
        return boundary_finish(histograms, beta, tau, normalizer)


def pooled_boundary_torch(
    lp: Tensor,  # [N] float32 or float64
    anomalous: Tensor,  # [N] bool
    beta: float,
    tau: float,
    normalizer: float,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return b_n, b_a and n_normal of all processes' rows, in plain PyTorch; every process passes the same type."""
    check_member(group)
    key_type, digits = (torch.int64, 8) if lp.dtype == torch.float64 else (torch.int32, 4)
    key = _ordered_key(lp, key_type)
    remaining = ~anomalous
    bins = torch.arange(256, device=lp.device)
    n_normal = rank = torch.zeros((), dtype=torch.int64, device=lp.device)
    chosen_key = torch.zeros((), dtype=key_type, device=lp.device)
    for shift in range(8 * (digits - 1), -1, -8):
        digit = ((key >> shift) & 255).long()  # [N]
        counts = torch.zeros(256, dtype=torch.int64, device=lp.device).scatter_add_(0, digit, remaining.long())
        _add_up(counts, group)
        if shift == 8 * (digits - 1):
            n_normal = counts.sum()
            rank = (n_normal.double() * beta).long()
        # 255 where no process has a row: there is no boundary then, but the digit must stay a digit.
        chosen = (counts.cumsum(0) <= rank).sum().clamp(max=255)
        rank = rank - torch.where(bins < chosen, counts, 0).sum()
        remaining = remaining & (digit == chosen)
        chosen_key = chosen_key | (chosen.to(key_type) << shift)
    value = _key_to_float(chosen_key, lp.dtype)
    b_n = torch.where(n_normal > 0, value / normalizer, torch.nan)
    return b_n, b_n - tau, n_normal


def check_member(group: ProcessGroup) -> None:
    """Raise `ConfigError` where this process does not belong to the group: it would keep its own boundary."""
    if torch.distributed.get_rank(group) < 0:
        raise ConfigError("this process is not a member of the group whose rows the boundary pools")


def _add_up(counts: Tensor, group: ProcessGroup) -> None:
    torch.distributed.all_reduce(counts, group=group)


def _ordered_key(x: Tensor, key_type: torch.dtype) -> Tensor:
    """Return bit patterns that order as unsigned integers like torch.sort orders x: NaN last, -0.0 equal to 0.0."""
    bits = torch.where(x == 0, 0.0, x).view(key_type)
    info = torch.iinfo(key_type)
    # Negative values turn around as a whole, the others get the top bit.
    key = bits ^ ((bits >> (info.bits - 1)) | info.min)
    return torch.where(x.isnan(), -1, key)


def _key_to_float(key: Tensor, dtype: torch.dtype) -> Tensor:
    """Invert `_ordered_key`."""
    return torch.where(key < 0, key ^ torch.iinfo(key.dtype).min, ~key).view(dtype)
