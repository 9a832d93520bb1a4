"""The official BGAD code's anomaly maps and PRO metric, computed by fastbgad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import ConfigError, FeatureError
from ...evaluate.metrics import ArrayLike, official_pro
from ...ops import score_map
from ...ops.dispatch import compute_dtype
from .flow import option

# Pixels of the anomaly maps that are computed at a time.
_PIXELS_AT_ONCE = 2**22


def convert_to_anomaly_scores(args: Any, logps_list: Sequence[Sequence[Tensor]]) -> NDArray[Any]:
    """Return the anomaly maps of a whole test set, high where patches are unlikely, with the official calibration.

        s = max over the set of S - S,        S = sum over levels of upsample(exp(logps - max over the set of logps))

    upsampled bilinearly with aligned corners. Maps are computed a few images at a time, so that memory holds little
    besides the result.

    Args:
        args: has `feature_levels`, the number of levels to use, and `img_size`, (H, W) or one number for both.
        logps_list: for every level the batches [b, h, w] of log-likelihoods per dimension.

    Returns:
        [N, H, W], float64 for float64 log-likelihoods and float32 otherwise. A single image keeps its batch dimension:
        [1, H, W], where the official code returns [H, W].

    Raises:
        ConfigError: args lacks an option or has an impossible one.
        FeatureError: a level that is missing or empty, shapes, types or devices that do not fit, and levels whose
            largest log-likelihood is NaN or infinite.
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
    scores = torch.empty(images, *size, dtype=compute_dtype(levels[0]))  # -S
    step = max(1, _PIXELS_AT_ONCE // (size[0] * size[1]))
    for start in range(0, images, step):
        rows = slice(start, start + step)
        scores[rows] = score_map([lp[rows] for lp in levels], size, level_max, 0.0).anomaly_map
    return scores.sub_(scores.min()).numpy()  # -S - min(-S) = max(S) - S


def calculate_pro_metric(scores: ArrayLike, gt_mask: ArrayLike) -> float:
    """Return the official PRO: 1000 thresholds, up to a false positive rate of 0.3; see `fastbgad.official_pro`.

    The exact value is `fastbgad.aupro`.

    Args:
        scores: anomaly maps [N, H, W], high where anomalous.
        gt_mask: [N, H, W], bool or two-valued.

    Raises:
        MetricError: as `fastbgad.official_pro`.
    """
    return official_pro(scores, gt_mask)


def t2np(tensor: Tensor | None) -> NDArray[Any] | None:
    """Return a tensor as a numpy array on the host; None stays None."""
    return None if tensor is None else tensor.detach().cpu().numpy()


def _map_size(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ConfigError(f"args.img_size is {size}; a map has at least one pixel")
    return int(height), int(width)


def _whole_level(level: int, parts: Sequence[Tensor]) -> Tensor:
    """Return the log-likelihoods [N, h, w] of one level, without gradients."""
    if len(parts) == 0:
        raise FeatureError(f"level {level} holds no log-likelihoods; append those of every batch")
    if any(lp.dim() != 3 or lp.shape[1:] != parts[0].shape[1:] for lp in parts):
        raise FeatureError(f"level {level} must hold [b, h, w] each, not {[tuple(lp.shape) for lp in parts]}")
    return parts[0].detach() if len(parts) == 1 else torch.cat([lp.detach() for lp in parts])
