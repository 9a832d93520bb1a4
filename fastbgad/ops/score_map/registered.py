"""The anomaly map as the registered operation `fastbgad::score_map`, which torch.compile and torch.export see as one.

It is for inference and has no gradient: `fastbgad.ops.score_map` keeps tensors that require one away from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import interpreting


@torch.library.custom_op("fastbgad::score_map", mutates_args=(), device_types="cuda")
def score_map_op(
    levels: Sequence[Tensor],  # each [B, h_l, w_l] float32, float16 or bfloat16
    height: int,
    width: int,
    level_max: Tensor,  # [L] float32
    offset: Tensor,  # scalar float32
) -> tuple[Tensor, Tensor]:
    """The map [B, height, width] and the image maximum [B], float32."""
    from ...kernels.score_map import score_map  # triton need not be installed

    return score_map(levels, (height, width), level_max, offset)


@score_map_op.register_kernel("cpu")
def _(levels: Sequence[Tensor], height: int, width: int, level_max: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """A graph traced for a GPU also runs here: by the interpreter if it is on, else by the portable path."""
    if interpreting():
        from ...kernels.score_map import score_map

        return score_map(levels, (height, width), level_max, offset)
    from .dispatcher import portable_score_map  # the door imports this file

    anomaly_map = portable_score_map([lp.float() for lp in levels], (height, width), level_max, offset)
    return anomaly_map, anomaly_map.amax(dim=(1, 2))


@score_map_op.register_fake
def _(levels: Sequence[Tensor], height: int, width: int, level_max: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    batch = levels[0].shape[0]
    return level_max.new_empty(batch, height, width), level_max.new_empty(batch)
