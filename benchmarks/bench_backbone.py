"""Frozen features: the truncated backbone against timm's own, and the Gabor filter bank.

    pytest benchmarks/bench_backbone.py -s

Equality is checked before anything is timed.
"""

from __future__ import annotations

import pytest
import timm
import torch
from interleave import interleaved, ratio_table, ratios
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastbgad.backbones import create_backbone

SIZE = 256


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_truncated_efficientnet_b6_against_timm(benchmark: BenchmarkFixture, images: Tensor) -> None:
    truncated = create_backbone("tf_efficientnet_b6", (1, 2, 3), "random", seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = timm.create_model("tf_efficientnet_b6", features_only=True, out_indices=(1, 2, 3))
    whole = whole.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def timm_features() -> list[Tensor]:
        normalised = (images.float() / 255 - truncated.mean) / truncated.std
        return whole(normalised.contiguous(memory_format=torch.channels_last))

    def truncated_features() -> list[Tensor]:
        return truncated(images)

    with torch.inference_mode():
        for ours, theirs in zip(truncated_features(), timm_features(), strict=True):
            assert torch.equal(ours, theirs)
        times = interleaved({"timm": timm_features, "truncated": truncated_features}, rounds=9, warmup=2)
        benchmark(truncated_features)
    benchmark.extra_info.update(speed_against_timm=ratios(times, "timm")["truncated"], image_size=SIZE)
    print(f"\ntf_efficientnet_b6, one {SIZE} px image, {torch.get_num_threads()} threads; bit-equal features")
    print(f"parameters dropped: {truncated.dropped_parameters:,}")
    print(ratio_table(times, "timm"))


def test_gabor(benchmark: BenchmarkFixture, images: Tensor) -> None:
    backbone = create_backbone("gabor")
    backbone.fit([images])
    with torch.inference_mode():
        features = benchmark(backbone, images)
    assert all(torch.isfinite(feature).all() for feature in features)
    benchmark.extra_info.update(image_size=SIZE)
    median = 1e3 * benchmark.stats.stats.median
    print(f"\ngabor, one {SIZE} px image, {torch.get_num_threads()} threads: {median:.2f} ms")
