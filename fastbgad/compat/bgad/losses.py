"""The official BGAD code's focal weights and its boundary-guided semi-push-pull loss.

A loss with its boundary in one launch, which these separate functions cannot be, is `fastbgad.ops.spp_loss`.

Source: Yao et al., CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...errors import ConfigError, FeatureError, check_choice
from ...ops.dispatch import check_mask_rows, compute_dtype

Empty = Literal["nan", "zero"]


def normal_fl_weighting(logps: Tensor, gamma: float = 0.5, alpha: float = 11.7, normalizer: float = 10) -> Tensor:
    """Return focal weights of normal rows: 1 where u > -0.2, else alpha (1 - e^u)^gamma |u|; u = logps / normalizer.

    Args:
        logps: log-likelihoods per dimension, any shape; usually detached, since weights are constants of the loss.
        gamma, alpha: exponent and factor of the weights of hard rows.
        normalizer: what logps is divided by.

    Returns:
        Weights of the shape and type of logps; 0 for NaN, as in the official code.

    Raises:
        ConfigError: a normalizer that is not positive.
    """
    u = _normalized(logps, normalizer)
    hard = u <= -0.2
    # Other rows get a harmless value: their slope may be infinite, and 0 * inf would make the gradient NaN.
    inside = torch.where(hard, u, -1.0)
    weights = alpha * (1 - torch.exp(inside)) ** gamma * torch.abs(inside)
    return torch.where(hard, weights, (u > -0.2).to(weights.dtype))


def abnormal_fl_weighting(logps: Tensor, gamma: float = 2, alpha: float = 0.53, normalizer: float = 10) -> Tensor:
    """Return weights of anomalous rows: 1 where u <= -1, else alpha (1 + e^u)^gamma / |u|; u = logps / normalizer.

    Arguments, results and errors as `normal_fl_weighting`. A row with u = 0 has an infinite weight, as in the official
    code; `fastbgad.ops.spp_loss` bounds it.
    """
    u = _normalized(logps, normalizer)
    hard = u > -1.0
    inside = torch.where(hard, u, -1.0)
    weights = alpha * (1 + torch.exp(inside)) ** gamma / torch.abs(inside)
    return torch.where(hard, weights, (u <= -1.0).to(weights.dtype))


def calculate_bg_spp_loss(
    logps: Tensor,
    mask: Tensor,
    boundaries: Sequence[Tensor | float],
    normalizer: float = 10,
    weights: Tensor | None = None,
    *,
    empty: Empty = "nan",
) -> tuple[Tensor, Tensor]:
    """Return the boundary-guided semi-push-pull losses of normal and of anomalous rows, means over violating rows.

        L_n = mean of w (b_n - u) over normal rows with u <= b_n
        L_a = mean of w (u - b_a) over anomalous rows with u >= b_a          u = logps / normalizer

    Args:
        logps: [N] log-likelihoods per dimension.
        mask: [N], 0 for normal and 1 for anomalous rows, of any type; rows with other values are left out.
        boundaries: b_n and b_a, as from `get_logp_boundary`; scalar tensors or numbers.
        normalizer: what logps is divided by.
        weights: [N] factors w of the rows; None for 1.
        empty: value of a term without a violating row: "nan", as in the official code, or "zero". Its gradient is zero
            in both cases, so a NaN loss does no harm to the weights; only the sum shown is lost.

    Returns:
        L_n and L_a, scalar tensors of the type of logps, or of weights if that is wider.

    Raises:
        ConfigError: an unknown `empty`, a normalizer that is not positive.
        FeatureError: shapes or devices that do not fit.

    Source: Yao et al., CVPR 2023.
    """
    u = _rows_of_loss(logps, mask, boundaries, normalizer, weights, empty)
    b_n, b_a = boundaries[0], boundaries[1]
    loss_n = _mean_of_violating(b_n - u, (mask == 0) & (u <= b_n), weights, empty)
    return loss_n, _mean_of_violating(u - b_a, (mask == 1) & (u >= b_a), weights, empty)


def calculate_bg_spp_loss_normal(
    logps: Tensor,
    mask: Tensor,
    boundaries: Sequence[Tensor | float],
    normalizer: float = 10,
    weights: Tensor | None = None,
    *,
    empty: Empty = "nan",
) -> Tensor:
    """Return L_n of `calculate_bg_spp_loss` alone, a scalar tensor; arguments and errors are the same."""
    u = _rows_of_loss(logps, mask, boundaries, normalizer, weights, empty)
    b_n = boundaries[0]
    return _mean_of_violating(b_n - u, (mask == 0) & (u <= b_n), weights, empty)


def _mean_of_violating(distance: Tensor, violating: Tensor, weights: Tensor | None, empty: Empty) -> Tensor:
    """Return the mean over the violating rows; of no row it is NaN (0 / 0) or 0."""
    if weights is not None:
        # torch.where, not a product alone: 0 times the infinite weight of a row that is left out would be NaN.
        distance = distance * torch.where(violating, weights, 0.0)
    # torch.where again, so that the infinite slope of 0 / 0 reaches no row.
    total = torch.where(violating, distance, 0.0).sum(dtype=compute_dtype(distance))
    count = violating.sum()
    return (total / (count if empty == "nan" else count.clamp(min=1))).to(distance.dtype)


def _rows_of_loss(
    logps: Tensor,
    mask: Tensor,
    boundaries: Sequence[Tensor | float],
    normalizer: float,
    weights: Tensor | None,
    empty: Empty,
) -> Tensor:
    """Check the arguments of a loss and return u = logps / normalizer."""
    check_mask_rows(logps, mask)
    if weights is not None and weights.shape != logps.shape:
        raise FeatureError(f"weights must be [{len(logps)}], one per row, not {tuple(weights.shape)}")
    if len(boundaries) != 2 or any(isinstance(b, Tensor) and b.numel() != 1 for b in boundaries):
        raise FeatureError("boundaries must be two numbers, b_n and b_a, as get_logp_boundary returns them")
    check_choice("empty", empty, Empty)
    return _normalized(logps, normalizer)


def _normalized(logps: Tensor, normalizer: float) -> Tensor:
    if not normalizer > 0:
        raise ConfigError(f"normalizer is {normalizer}; it must be positive")
    return logps / normalizer
