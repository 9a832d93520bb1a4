"""Frozen features: the truncated backbone against timm's own, and the Gabor filter bank.

    pytest benchmarks/bench_backbone.py

The truncated backbone runs the same operations on the same weights: its float32 features are compared bit by bit on a
CPU before anything is timed. Weights are random; the time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import timm
import torch
from harness import DEVICE, Comparison, Contender, run
from torch import Tensor

from fastbgad.backbones import Backbone, create_backbone

MODEL, LEVELS = "tf_efficientnet_b6", (1, 2, 3)
TIMM, TRUNCATED, TRUNCATED_BF16 = "timm features_only", "fastbgad truncated", "fastbgad truncated, bfloat16"
GABOR = "fastbgad gabor"
# Bit-equal on a CPU. cuDNN may choose another algorithm for the same convolution, and multiplies in TF32.
TOLERANCE = 0.0 if DEVICE.type == "cpu" else 1e-3
# bfloat16 keeps 8 bits (4e-3) and rounds anew in each of about 30 blocks. Whether features are good enough is not asked
# here: this only catches a model that computes something else.
BF16_TOLERANCE = 1e-1

Features = Callable[[Tensor], list[Tensor]]


def make_image(pixels: int) -> Tensor:
    """One image, uint8 [1, 3, pixels, pixels]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, pixels, pixels), dtype=torch.uint8, generator=generator).to(DEVICE)


@lru_cache(maxsize=1)
def whole() -> Features:
    """timm's model with the weights of the truncated one, normalising images in the same way."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(MODEL, features_only=True, out_indices=LEVELS)
    model = model.eval().requires_grad_(False).to(DEVICE, memory_format=torch.channels_last)
    cut = truncated("float32")

    def features(image: Tensor) -> list[Tensor]:
        normalised = (image.float() / 255 - cut.mean) / cut.std
        return model(normalised.contiguous(memory_format=torch.channels_last))

    return features


@lru_cache(maxsize=2)
def truncated(dtype: str) -> Backbone:
    return create_backbone(MODEL, LEVELS, "random", seed=0, dtype=dtype, standardize="none").to(DEVICE)


def gabor(pixels: int) -> Contender:
    """There is nothing to compare it with: its features must be finite."""
    image = make_image(pixels)
    backbone = create_backbone("gabor").to(DEVICE)
    backbone.fit([image])
    call = torch.inference_mode()(partial(backbone, image))
    return Contender(call, lambda: 0.0 if all(torch.isfinite(level).all() for level in call()) else float("nan"))


def contender(make_features: Callable[[], Features], pixels: int, tolerance: float) -> Contender:
    image = make_image(pixels)
    call = torch.inference_mode()(partial(make_features(), image))

    @torch.inference_mode()
    def error() -> float:
        pairs = zip(call(), whole()(image), strict=True)
        errors = [(found.float() - theirs).norm() / theirs.norm() for found, theirs in pairs]
        return float(torch.stack(errors).max())

    return Contender(call, error, tolerance)


def comparisons() -> list[Comparison]:
    found = []
    for pixels in (256, 1024):
        contenders = {
            TIMM: partial(contender, whole, pixels, TOLERANCE),
            TRUNCATED: partial(contender, partial(truncated, "float32"), pixels, TOLERANCE),
        }
        if pixels == 256:
            contenders[TRUNCATED_BF16] = partial(contender, partial(truncated, "bfloat16"), pixels, BF16_TOLERANCE)
        found.append(
            Comparison(
                f"features of {MODEL}, one image of {pixels} px",
                baseline=TIMM,
                contenders=contenders,
                ours=(TRUNCATED,),  # not every CPU has bfloat16 arithmetic
                sizes={"pixels": pixels, "batch": 1},
                images=1,
                rounds=9 if pixels < 1024 else 3,
                warmup=1 if pixels < 1024 else 0,  # the check was a call
                memory=True,
            )
        )
    found.append(
        Comparison(
            "features of gabor, one image of 256 px",
            baseline=GABOR,
            contenders={GABOR: partial(gabor, 256)},
            ours=(GABOR,),
            sizes={"pixels": 256, "batch": 1},
            images=1,
            rounds=15,
            memory=True,
        )
    )
    return found


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda comparison: comparison.name)
def test_features(comparison: Comparison, benchmark, capsys) -> None:
    run(comparison, benchmark, capsys)
