"""The official BGAD code's functions: the same names, arguments and numbers, computed by fastbgad.

    from fastbgad.compat.bgad import calculate_bg_spp_loss, get_logp, get_logp_boundary, load_flow_model

Code written for https://github.com/xcyao00/BGAD changes its import lines and stays as it is. What differs:

- No row is selected by a boolean index, so a GPU is not waited for. Values are looked at where that is free: on the
  CPU, and inside `fastbgad.ops.debug_checks`.
- A set without a row gives NaN, as there, or 0 with `empty="zero"`; its gradient is zero in both cases, as there.
- Arguments that cannot be meant raise a `FastBGADError`. Nothing is printed.
- The map of a single test image keeps its batch dimension; the official code loses it.

A loss with its boundary in one launch, which these separate functions cannot be, is `fastbgad.ops.spp_loss`.

Source: Yao et al., CVPR 2023.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import ConfigError, FeatureError
from ...evaluate.metrics import ArrayLike, official_pro
from ...ops import boundary, log_likelihood, score_map
from ...ops.boundary.dispatcher import check_boundary_options
from ...ops.debug import debugging
from ...ops.dispatch import check_mask_rows, compute_dtype
from ...ops.positional_tensor import PositionalEncoding, positional_map
from .checkpoint import load_weights, save_weights
from .flow import FlowDecoder, conditional_flow_model, flow_model, load_flow_model, option

__all__ = [
    "FlowDecoder",
    "abnormal_fl_weighting",
    "calculate_bg_spp_loss",
    "calculate_bg_spp_loss_normal",
    "calculate_pro_metric",
    "conditional_flow_model",
    "convert_to_anomaly_scores",
    "flow_model",
    "get_logp",
    "get_logp_boundary",
    "load_flow_model",
    "load_weights",
    "normal_fl_weighting",
    "positionalencoding2d",
    "save_weights",
    "t2np",
]

Empty = Literal["nan", "zero"]

# Rows up to which it is worth comparing the two roundings of a boundary's place; it takes 20 ms there, once.
_MOST_ROWS_COMPARED = 2**20
# Pixels of the anomaly maps that are made at a time.
_PIXELS_AT_ONCE = 2**22


def get_logp(C: int, z: Tensor, logdet_J: Tensor) -> Tensor:
    """The log-likelihood [N] of each row in nats, not divided by C: -C/2 ln(2 pi) - |z|^2 / 2 + logdet_J.

    Args:
        C: number of channels.
        z: [N, C], the latent, floating point.
        logdet_J: [N], log|det J|.

    Returns:
        float64 if an argument is, float32 otherwise; differentiable.

    Raises:
        FeatureError: shapes, types or devices that do not fit.
    """
    if z.dim() == 2 and z.shape[1] != C:
        raise FeatureError(f"C is {C} but z has {z.shape[1]} channels; C is the number of channels of z")
    return C * log_likelihood(z, logdet_J)


def normal_fl_weighting(logps: Tensor, gamma: float = 0.5, alpha: float = 11.7, normalizer: float = 10) -> Tensor:
    """Focal weights of normal rows: 1 where u > -0.2, else alpha (1 - e^u)^gamma |u|, with u = logps / normalizer.

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
    # The formula sees only rows that it is for: elsewhere its slope may be infinite, and 0 * inf would be a gradient.
    inside = torch.where(hard, u, -1.0)
    weights = alpha * (1 - torch.exp(inside)) ** gamma * torch.abs(inside)
    return torch.where(hard, weights, (u > -0.2).to(weights.dtype))


def abnormal_fl_weighting(logps: Tensor, gamma: float = 2, alpha: float = 0.53, normalizer: float = 10) -> Tensor:
    """Focal weights of anomalous rows: 1 where u <= -1, else alpha (1 + e^u)^gamma / |u|, with u = logps / normalizer.

    Arguments, results and errors as `normal_fl_weighting`. A row with u = 0 has an infinite weight, as in the official
    code; `fastbgad.ops.spp_loss` bounds it.
    """
    u = _normalized(logps, normalizer)
    hard = u > -1.0
    inside = torch.where(hard, u, -1.0)
    weights = alpha * (1 + torch.exp(inside)) ** gamma / torch.abs(inside)
    return torch.where(hard, weights, (u <= -1.0).to(weights.dtype))


def get_logp_boundary(
    logps: Tensor, mask: Tensor, pos_beta: float = 0.05, margin_tau: float = 0.1, normalizer: float = 10
) -> tuple[Tensor, Tensor]:
    """The explicit boundary: b_n, the int(n_normal * pos_beta)-th smallest normal log-likelihood, and b_n - margin_tau.

    The product that is cut to an integer is rounded to float32, as the official code does without saying so; where
    that can change the row chosen (pos_beta 0.29 and 100 normal rows), it is done here as well.

    Args:
        logps: [N] log-likelihoods per dimension; detached here.
        mask: [N], 0 for normal and 1 for anomalous rows, of any type.
        pos_beta: percentile as a fraction, 0 <= pos_beta < 1.
        margin_tau: distance of the two boundaries, in units of logps / normalizer.
        normalizer: what logps is divided by.

    Returns:
        b_n and b_a, scalar tensors of the type of logps, in units of logps / normalizer. Without a normal row both are
        NaN, so no row violates them; the official code stops with an IndexError, which a GPU would have to be waited
        for.

    Raises:
        ConfigError: pos_beta outside [0, 1), a negative margin_tau, a normalizer that is not positive.
        FeatureError: shapes or devices that do not fit. On the CPU and inside `fastbgad.ops.debug_checks` also NaN,
            and a mask with values besides 0 and 1; elsewhere NaN counts as larger than everything.

    Source: Yao et al., CVPR 2023, "explicit boundary generating".
    """
    check_mask_rows(logps, mask)
    check_boundary_options(pos_beta, margin_tau, normalizer)
    lp, anomalous = logps.detach(), mask != 0
    on_host = lp.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host or debugging():
        _check_values(lp, mask, anomalous)
    if on_host:
        b_n = _smallest_normal(lp[~anomalous], pos_beta) / normalizer
    elif _same_place(float(pos_beta), len(lp)):
        b_n = boundary(lp, anomalous, beta=pos_beta, tau=margin_tau, normalizer=normalizer).b_n.to(lp.dtype)
    else:
        b_n = _smallest_normal_in_place(lp, anomalous, pos_beta) / normalizer
    return b_n, b_n - margin_tau


def calculate_bg_spp_loss(
    logps: Tensor,
    mask: Tensor,
    boundaries: Sequence[Tensor | float],
    normalizer: float = 10,
    weights: Tensor | None = None,
    *,
    empty: Empty = "nan",
) -> tuple[Tensor, Tensor]:
    """The boundary-guided semi-push-pull loss: the mean over violating rows, normal ones and anomalous ones.

        L_n = mean of w (b_n - u) over normal rows with u <= b_n
        L_a = mean of w (u - b_a) over anomalous rows with u >= b_a          u = logps / normalizer

    Args:
        logps: [N] log-likelihoods per dimension.
        mask: [N], 0 for normal and 1 for anomalous rows, of any type; other rows take part in neither.
        boundaries: b_n and b_a, as from `get_logp_boundary`; scalar tensors or numbers.
        normalizer: what logps is divided by.
        weights: [N] factors w of the rows; None for 1.
        empty: what a term without a violating row is: "nan", as in the official code, or "zero". Its gradient is zero
            in both cases, so that a NaN loss does no harm to the weights; only the sum shown is lost.

    Returns:
        L_n and L_a, scalar tensors of the type of logps, or of weights if that is wider.

    Raises:
        ConfigError: an unknown `empty`, a normalizer that is not positive. FeatureError: shapes or devices that do not
        fit.

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
    """L_n of `calculate_bg_spp_loss` alone, a scalar tensor; arguments and errors are the same."""
    u = _rows_of_loss(logps, mask, boundaries, normalizer, weights, empty)
    b_n = boundaries[0]
    return _mean_of_violating(b_n - u, (mask == 0) & (u <= b_n), weights, empty)


def positionalencoding2d(D: int, H: int, W: int) -> PositionalEncoding:
    """The positional condition of every place of a map, float32 [D, H, W] on the CPU.

    It is computed in float64; the official float32 values are off by 6e-8 per place from the corner. The tensor
    remembers places through repeat, permute, reshape and selections, which lets flows of fastbgad use its structure:
    see `fastbgad.ops.positional_tensor`.

    Raises:
        FeatureError: D is not a positive multiple of 4 (a ValueError in the official code), or an empty map.
    """
    return positional_map(D, H, W)


def convert_to_anomaly_scores(args: Any, logps_list: Sequence[Sequence[Tensor]]) -> NDArray[Any]:
    """The anomaly maps of a whole test set, high where patches are unlikely, with the official calibration.

        s = max over the set of S - S,        S = sum over levels of upsample(exp(logps - max over the set of logps))

    upsampled bilinearly with aligned corners. Maps are made a few images at a time: what is in memory at once is the
    result and little else.

    Args:
        args: `feature_levels`, how many levels to use, and `img_size`, (H, W) or one number for both.
        logps_list: for every level the batches [b, h, w] of log-likelihoods per dimension.

    Returns:
        [N, H, W], float64 for float64 log-likelihoods and float32 otherwise. A single image keeps its batch dimension:
        [1, H, W], where the official code returns [H, W].

    Raises:
        ConfigError: args lacks an option or has one that cannot be. FeatureError: a level that is missing or empty,
        shapes, types or devices that do not fit, and levels whose largest log-likelihood is NaN or infinite.
    """
    size = _map_size(option(args, "img_size"))
    count = option(args, "feature_levels")
    if not 1 <= count <= len(logps_list):
        raise FeatureError(f"args.feature_levels is {count} but log-likelihoods of {len(logps_list)} levels were given")
    levels = [_whole_level(level, parts) for level, parts in enumerate(logps_list[:count])]
    images = len(levels[0])
    if any(len(lp) != images for lp in levels):
        raise FeatureError(f"levels must hold the same images, not {', '.join(str(len(lp)) for lp in levels)} images")
    level_max = torch.stack([lp.max() for lp in levels])
    for level, largest in enumerate(level_max.tolist()):
        if not math.isfinite(largest):
            raise FeatureError(f"the largest log-likelihood of level {level} is {largest}; scores need finite ones")
    scores = torch.empty(images, *size, dtype=compute_dtype(levels[0]))
    step = max(1, _PIXELS_AT_ONCE // (size[0] * size[1]))
    for start in range(0, images, step):
        rows = slice(start, start + step)
        scores[rows] = score_map([lp[rows] for lp in levels], size, level_max, 0.0).anomaly_map
    return scores.sub_(scores.min()).numpy()  # scores were -S, and -S - min(-S) = max(S) - S


def calculate_pro_metric(scores: ArrayLike, gt_mask: ArrayLike) -> float:
    """The official PRO: 1000 thresholds, up to a false positive rate of 0.3; see `fastbgad.official_pro`.

    Args:
        scores: anomaly maps [N, H, W], high where anomalous.
        gt_mask: [N, H, W], bool or two-valued.

    Raises:
        MetricError: as `fastbgad.official_pro`. The exact value is `fastbgad.aupro`.
    """
    return official_pro(scores, gt_mask)


def t2np(tensor: Tensor | None) -> NDArray[Any] | None:
    """A tensor as a numpy array on the host; None stays None."""
    return None if tensor is None else tensor.detach().cpu().numpy()


def _mean_of_violating(distance: Tensor, violating: Tensor, weights: Tensor | None, empty: Empty) -> Tensor:
    """The sum over the violating rows divided by their number; 0 / 0 is the NaN of an empty mean."""
    if weights is not None:
        # where, not a product alone: an infinite weight of a row that does not take part must not meet its 0.
        distance = distance * torch.where(violating, weights, 0.0)
    # Outermost, so that the infinite slope of 0 / 0 ends here.
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
    """Checks the arguments of a loss; returns u = logps / normalizer."""
    check_mask_rows(logps, mask)
    if weights is not None and weights.shape != logps.shape:
        raise FeatureError(f"weights must be [{len(logps)}], one per row, not {tuple(weights.shape)}")
    if len(boundaries) != 2 or any(isinstance(b, Tensor) and b.numel() != 1 for b in boundaries):
        raise FeatureError("boundaries must be two numbers, b_n and b_a, as get_logp_boundary returns them")
    if empty not in get_args(Empty):
        raise ConfigError(f"empty is {empty!r}; choose one of {', '.join(get_args(Empty))}")
    return _normalized(logps, normalizer)


def _normalized(logps: Tensor, normalizer: float) -> Tensor:
    if not normalizer > 0:
        raise ConfigError(f"normalizer is {normalizer}; it must be positive")
    return logps / normalizer


def _check_values(lp: Tensor, mask: Tensor, anomalous: Tensor) -> None:
    if len(lp) and math.isnan(float(lp.max())):
        raise FeatureError(
            f"{int(torch.isnan(lp).sum())} of {len(lp)} log-likelihoods are NaN; a boundary needs numbers: "
            "leave those rows out, or look for NaN in the features"
        )
    if mask.dtype != torch.bool and not torch.equal(mask, anomalous.to(mask.dtype)):
        raise FeatureError("the mask has values besides 0 (normal) and 1 (anomalous); binarise it")


def _smallest_normal(normal: Tensor, beta: float) -> Tensor:
    """The int(n * beta)-th smallest of n values on the CPU, without NaN; NaN if there is none."""
    if len(normal) == 0:
        return normal.new_full((), torch.nan)
    place = int(np.float32(len(normal)) * np.float32(beta))
    return torch.kthvalue(normal, min(place, len(normal) - 1) + 1).values


def _smallest_normal_in_place(lp: Tensor, anomalous: Tensor, beta: float) -> Tensor:
    """The same of the normal rows of [N], without waiting for the device."""
    if len(lp) == 0:
        return lp.new_full((), torch.nan)
    n_normal = len(lp) - anomalous.sum()
    last = (n_normal - 1).clamp(min=0)
    place = torch.minimum((n_normal.float() * beta).long(), last)
    # Anomalous rows move behind all normal ones, which leaves NaN where there is no normal row.
    return torch.sort(torch.where(anomalous, torch.nan, lp)).values.gather(0, place.reshape(1))[0]


@functools.lru_cache(maxsize=256)
def _same_place(beta: float, rows: int) -> bool:
    """Whether int(n * beta) is the same with a product in float32 and in float64, for every n up to rows."""
    if rows > _MOST_ROWS_COMPARED:
        return False
    n = np.arange(rows + 1)
    product = n.astype(np.float32) * np.float32(beta)
    return np.array_equal(product.astype(np.int64), (n * beta).astype(np.int64))


def _map_size(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ConfigError(f"args.img_size is {size}; a map has at least one pixel")
    return int(height), int(width)


def _whole_level(level: int, parts: Sequence[Tensor]) -> Tensor:
    """The log-likelihoods [N, h, w] of one level, without gradients."""
    if len(parts) == 0:
        raise FeatureError(f"level {level} holds no log-likelihoods; append those of every batch")
    if any(lp.dim() != 3 or lp.shape[1:] != parts[0].shape[1:] for lp in parts):
        raise FeatureError(f"level {level} must hold [b, h, w] each, not {[tuple(lp.shape) for lp in parts]}")
    return parts[0].detach() if len(parts) == 1 else torch.cat([lp.detach() for lp in parts])
