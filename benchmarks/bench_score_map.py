"""The anomaly map against three interpolate calls, at 256 and 1024 pixels.

    pytest benchmarks/bench_score_map.py

The baseline does what the official code does, one full-size map per level, summed and reduced afterwards, in float32
and on the device (the official code goes through float64 and NumPy on the host, which would flatter us). Every
contender's map and image scores are compared with the float64 oracle before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import pytest
import torch
from harness import DEVICE, Comparison, Contender, implementations, run
from torch import Tensor
from torch.nn.functional import interpolate

from fastbgad import reference
from fastbgad.ops import Impl, score_map

INTERPOLATE = "three interpolate calls"
# Of map and image score, relative to the largest value of the map: float32 rounding.
TOLERANCE = 1e-5
OFFSET = 3.0


class Levels(NamedTuple):
    """Log-likelihoods of three levels of an EfficientNet: a quarter, an eighth and a sixteenth of the image's side."""

    lp: list[Tensor]  # float32 [B, size / 4, size / 4] and so on
    size: int  # of the image
    level_max: Tensor  # float32 [3]
    offset: Tensor  # float32 scalar


# What every contender returns: the map [B, size, size] and the image scores [B].
Scores = Callable[[Levels], tuple[Tensor, Tensor]]


# One size at a time: the tensors of one comparison go when the next one makes its own.
@lru_cache(maxsize=1)
def make_levels(pixels: int, batch: int) -> Levels:
    generator = torch.Generator().manual_seed(pixels)
    sides = (pixels // 4, pixels // 8, pixels // 16)
    lp = [(torch.randn(batch, side, side, generator=generator) - 2).to(DEVICE) for side in sides]
    return Levels(lp, pixels, torch.stack([level.max() for level in lp]), torch.tensor(OFFSET, device=DEVICE))


@lru_cache(maxsize=1)
def exact(pixels: int, batch: int) -> Tensor:
    """Return the reference's map, float64 [B, pixels, pixels]."""
    levels = make_levels(pixels, batch)
    return reference.score_map([lp.double() for lp in levels.lp], (pixels, pixels), levels.level_max.double(), OFFSET)


def three_interpolations(levels: Levels) -> tuple[Tensor, Tensor]:
    """The anomaly map and the image scores, level by level as the official BGAD makes them."""
    maps = []
    for lp, most in zip(levels.lp, levels.level_max, strict=True):
        likelihood = torch.exp(lp - most).unsqueeze(1)
        upsampled = interpolate(likelihood, size=(levels.size, levels.size), mode="bilinear", align_corners=True)
        maps.append(upsampled.squeeze(1))
    total = torch.zeros_like(maps[0])
    for level in maps:
        total += level
    anomaly_map = levels.offset - total
    return anomaly_map, anomaly_map.flatten(1).max(dim=1).values


def plain() -> Scores:
    return three_interpolations


def operation(levels: Levels, impl: Impl) -> tuple[Tensor, Tensor]:
    return score_map(levels.lp, (levels.size, levels.size), levels.level_max, levels.offset, impl=impl)


def ours(impl: Impl) -> Scores:
    return partial(operation, impl=impl)


def contender(make_scores: Callable[[], Scores], pixels: int, batch: int) -> Contender:
    call = partial(make_scores(), make_levels(pixels, batch))

    def error() -> float:
        anomaly_map, image_scores = call()
        truth = exact(pixels, batch)
        errors = [(anomaly_map - truth).abs().max(), (image_scores - truth.amax(dim=(1, 2))).abs().max()]
        return float(torch.stack(errors).max() / truth.abs().max())

    return Contender(call, error, TOLERANCE)


def comparisons() -> list[Comparison]:
    scores = {INTERPOLATE: plain, **implementations(ours)}
    return [
        Comparison(
            f"anomaly map, {batch} images of {pixels} px",
            baseline=INTERPOLATE,
            contenders={name: partial(contender, make, pixels, batch) for name, make in scores.items()},
            sizes={"pixels": pixels, "batch": batch},
            images=batch,
            rounds=21,
            warmup=3,
            memory=True,
            track=pixels == 1024,
        )
        for pixels, batch in ((256, 32), (1024, 4))
    ]


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda comparison: comparison.name)
def test_score_map(comparison: Comparison, benchmark, capsys) -> None:
    run(comparison, benchmark, capsys)
