"""The door to the anomaly map. Oracle: `fastbgad.reference.score_map`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .. import reference
from ..errors import FeatureError
from .dispatch import Impl, resolve_impl


def score_map(
    levels: Sequence[Tensor],  # each [B, h_l, w_l]
    size: tuple[int, int],
    level_max: Tensor,  # [L]
    offset: Tensor | float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """The anomaly map [B, H, W] of log-likelihood maps, high where patches are unlikely.

        score = offset - sum over levels of upsample(exp(lp_l - level_max_l))

    upsampled bilinearly with aligned corners. One map is added to at a time: no level's upsampled map outlives its
    addition.

    Args:
        levels: per level lp [B, h_l, w_l].
        size: (H, W) of the map.
        level_max: [L], the log-likelihood that counts as fully normal.
        offset: what the summed likelihood is subtracted from.
        impl: "auto", "torch" or "reference".

    Raises:
        FeatureError: no level, other shapes, or a number of constants that is not the number of levels.

    Source: official BGAD and CFLOW-AD.
    """
    kind = resolve_impl(impl)
    if not levels or any(lp.dim() != 3 or len(lp) != len(levels[0]) for lp in levels):
        raise FeatureError(f"levels must be [B, h, w] each with the same B, not {[tuple(lp.shape) for lp in levels]}")
    if level_max.shape != (len(levels),):
        raise FeatureError(f"{len(levels)} levels need as many constants, not {tuple(level_max.shape)}")
    if kind == "reference":
        return reference.score_map(levels, size, level_max, offset)
    total = None
    for lp, constant in zip(levels, level_max, strict=True):
        likelihood = torch.exp(lp - constant)[:, None]
        upsampled = interpolate(likelihood, size=size, mode="bilinear", align_corners=True)[:, 0]
        total = upsampled if total is None else total.add_(upsampled)
    assert total is not None
    return offset - total
