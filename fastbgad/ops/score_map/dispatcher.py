"""Dispatcher of the anomaly map. Reference: `fastbgad.reference.score_map`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import reference
from ...errors import BackendError, FeatureError
from ..dispatch import Impl, compute_dtype, resolve_impl
from .portable import portable_score_map
from .registered import score_map_op


class ScoreMap(NamedTuple):
    """Anomaly scores of B images; float64 for float64 log-likelihoods, float32 otherwise."""

    anomaly_map: Tensor  # [B, H, W], high where patches are unlikely
    image_score: Tensor  # [B], the maximum of the map; NaN where the map holds one


def score_map(
    levels: Sequence[Tensor],  # each [B, h_l, w_l]
    size: tuple[int, int],
    level_max: Tensor,  # [L]
    offset: Tensor | float,
    *,
    impl: Impl = "auto",
) -> ScoreMap:
    """Return the anomaly map of log-likelihood maps and its maximum, high where patches are unlikely.

        anomaly_map = offset - sum over levels of upsample(exp(lp_l - level_max_l))

    upsampled bilinearly with aligned corners. The kernel makes the map and its maximum in one pass without upsampling
    any level in memory; the portable path adds one level's upsampled map at a time. Nothing waits for the device.

    Args:
        levels: per level lp [B, h_l, w_l], all of one floating-point type and on one device.
        size: (H, W) of the map.
        level_max: [L], the log-likelihood that counts as fully normal, on the levels' device.
        offset: the summed likelihood is subtracted from it; a number, or a tensor with one element.
        impl: "auto", "torch", "triton" or "reference". The kernel has no gradient: where one is required, "auto" takes
            the portable path.

    Returns:
        `ScoreMap(anomaly_map [B, H, W], image_score [B])`.

    Raises:
        FeatureError: no level, other shapes, types or devices, or a number of constants that is not that of levels.
        BackendError: "triton" for tensors that require a gradient; see also `fastbgad.ops.dispatch`.

    Source: official BGAD and CFLOW-AD.
    """
    _check(levels, size, level_max, offset)
    kind = resolve_impl(impl, levels[0])
    dtype = compute_dtype(levels[0])
    level_max = level_max.to(dtype)
    offset = offset.to(dtype).reshape(()) if isinstance(offset, Tensor) else offset
    if kind == "triton":
        inputs = [*levels, level_max, *([offset] if isinstance(offset, Tensor) else [])]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
            if not isinstance(offset, Tensor):
                offset = level_max.new_full((), offset)
            return ScoreMap(*score_map_op(levels, *size, level_max, offset))
        if impl == "triton":
            raise BackendError(
                'impl="triton": the kernel of the anomaly map has no gradient and its input requires one; use '
                'impl="torch" or "auto", or call it under torch.no_grad()'
            )
    make = reference.score_map if kind == "reference" else portable_score_map
    anomaly_map = make([lp.to(dtype) for lp in levels], size, level_max, offset)
    return ScoreMap(anomaly_map, anomaly_map.amax(dim=(1, 2)))


def _check(levels: Sequence[Tensor], size: tuple[int, int], level_max: Tensor, offset: Tensor | float) -> None:
    if not levels or any(lp.dim() != 3 or len(lp) != len(levels[0]) for lp in levels):
        raise FeatureError(f"levels must be [B, h, w] each with the same B, not {[tuple(lp.shape) for lp in levels]}")
    if min(*size, *(side for lp in levels for side in lp.shape[1:])) < 1:
        raise FeatureError(f"a map cannot be empty: size {size}, levels {[tuple(lp.shape) for lp in levels]}")
    if level_max.shape != (len(levels),):
        raise FeatureError(f"{len(levels)} levels need as many constants, not {tuple(level_max.shape)}")
    if isinstance(offset, Tensor) and offset.numel() != 1:
        raise FeatureError(f"offset must be one number, not {tuple(offset.shape)}")
    if len({lp.dtype for lp in levels}) > 1:
        raise FeatureError(f"levels must have one type, not {', '.join(str(lp.dtype) for lp in levels)}")
    constants = [level_max, offset] if isinstance(offset, Tensor) else [level_max]
    devices = {tensor.device for tensor in (*levels, *constants)}
    if len(devices) > 1:
        raise FeatureError(f"levels and constants must be on one device, not on {', '.join(map(str, devices))}")
