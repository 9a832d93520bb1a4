"""The anomaly map as the registered operator `fastbgad::score_map`.

It is for inference and has no gradient: `fastbgad.ops.score_map` keeps tensors that require one away from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..registration import register
from .portable import portable_score_map


def _launch(
    levels: Sequence[Tensor],  # each [B, h_l, w_l] float32, float16 or bfloat16
    height: int,
    width: int,
    level_max: Tensor,  # [L] float32
    offset: Tensor,  # scalar float32
) -> tuple[Tensor, Tensor]:
    """Return the map [B, height, width] and the image maximum [B], float32."""
    from ...kernels.score_map import score_map  # triton need not be installed

    return score_map(levels, (height, width), level_max, offset)


def _portable(
    levels: Sequence[Tensor], height: int, width: int, level_max: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    anomaly_map = portable_score_map([lp.float() for lp in levels], (height, width), level_max, offset)
    return anomaly_map, anomaly_map.amax(dim=(1, 2))


def _fake(
    levels: Sequence[Tensor], height: int, width: int, level_max: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    batch = levels[0].shape[0]
    return level_max.new_empty(batch, height, width), level_max.new_empty(batch)


score_map_op: Any = register("score_map", _launch, portable=_portable, fake=_fake)
