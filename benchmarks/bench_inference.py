"""From image to anomaly map: the official pipeline's arithmetic against fastbgad.

    pytest benchmarks/bench_inference.py

The official arithmetic, re-stated with its own parts: timm's whole `features_only` model in the default memory format,
the positional encoding made anew and repeated for every row, FrEIA's flow, three maps upsampled to the image's size.
Weights are random but the same on both sides. Each contender's map is compared with the oracle's in float64, from the
features of timm's model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from bench_score_map import Levels, three_interpolations
from harness import DEVICE, KERNELS, PORTABLE, Comparison, Contender, SkippedError, kernels_or_skip, run
from roofline import LEVELS, image_flops
from torch import Tensor, nn

from fastbgad import reference
from fastbgad.backbones import create_backbone
from fastbgad.flow_spec import FlowSpec
from fastbgad.model import BGAD
from fastbgad.model.flow import ConditionalFlow
from fastbgad.model.scoring import Calibration
from fastbgad.ops import Impl, PositionalRows, score_map
from tests.flows import double, freia_flow

OFFICIAL, BFLOAT16 = "official arithmetic", "fastbgad torch, bfloat16 backbone"
B6 = "tf_efficientnet_b6"
# Of the anomaly map, in units of its largest value. bfloat16 keeps 8 bits of every activation of the backbone.
TOLERANCE, HALF_TOLERANCE = {PORTABLE: 1e-4, OFFICIAL: 1e-4, KERNELS: 1e-3}, 0.2


class Pipelines:
    """The same detector three times: official arithmetic, reference, fastbgad."""

    def __init__(self, backbone: str, size: int, batch: int) -> None:
        self.size = size
        generator = torch.Generator().manual_seed(size)
        self.images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator).to(DEVICE)
        truncated = create_backbone(backbone, (1, 2, 3), "random", seed=0, standardize="none")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            whole = timm.create_model(backbone, features_only=True, out_indices=(1, 2, 3))
        self.whole = whole.eval().requires_grad_(False).to(DEVICE)
        self.mean, self.std = truncated.mean.to(DEVICE), truncated.std.to(DEVICE)
        self.flows = nn.ModuleList(
            freia_flow(FlowSpec(channels), seed=channels).float().requires_grad_(False)
            for channels in truncated.channels
        ).to(DEVICE)
        self.model = BGAD(truncated, (size, size)).eval().requires_grad_(False).to(DEVICE)
        for level, flow in enumerate(self.flows):
            self.model.flow(level).load_state_dict(flow.state_dict())
            self.model.flow(level).freeze()
        with torch.no_grad():
            levels = self.official_levels()
        self.level_max = [lp.max() for lp in levels]
        self.exact, offset = self.oracle()
        boundaries = torch.tensor([[-1.0, -1.1]] * len(levels))
        self.model.set_calibration(Calibration(torch.stack(self.level_max), offset, boundaries))

    def features(self) -> list[Tensor]:
        return self.whole((self.images.float() / 255 - self.mean) / self.std)

    def official_levels(self) -> list[Tensor]:
        """lp [B, h, w] of each level."""
        levels = []
        for flow, maps in zip(self.flows, self.features(), strict=True):
            batch, channels, height, width = maps.shape
            rows = maps.permute(0, 2, 3, 1).reshape(-1, channels)
            encoding = PositionalRows(height, width).dense(len(rows), torch.float32, rows.device)
            lp = reference.log_likelihood(*flow(rows, [encoding]))
            levels.append(lp.reshape(batch, height, width))
        return levels

    def official(self) -> Tensor:
        with torch.no_grad():
            levels = Levels(
                self.official_levels(), self.size, torch.stack(self.level_max), torch.zeros((), device=DEVICE)
            )
            found, _ = three_interpolations(levels)
            return found - found.min()

    def oracle(self) -> tuple[Tensor, Tensor]:
        """The map in float64 [B, size, size] of float32 features, and the offset that belongs to it."""
        levels = []
        with torch.no_grad():
            for level, maps in enumerate(self.features()):
                batch, channels, height, width = maps.shape
                flow = self.model.flow(level)
                rows = maps.permute(0, 2, 3, 1).reshape(-1, channels).double()
                dense = PositionalRows(height, width).dense(len(rows), torch.float64, rows.device)
                layers = double(flow.weights())
                parts = [
                    reference.log_likelihood(*reference.flow_forward(x, layers, flow.spec, p)).detach()
                    for x, p in zip(rows.split(8192), dense.split(8192), strict=True)
                ]
                levels.append(torch.cat(parts).reshape(batch, height, width))
            most = torch.stack(self.level_max).double()
            size = (self.size, self.size)
            offset = -reference.score_map(levels, size, most, 0.0).min()
            return reference.score_map(levels, size, most, float(offset)), offset.float()

    def fast(self, impl: Impl) -> Tensor:
        return self.model.predict(self.images, impl=impl).anomaly_map

    def fast_half(self) -> Callable[[], Tensor]:
        half = create_backbone(
            self.model.backbone.name, (1, 2, 3), "random", seed=0, dtype="bfloat16", standardize="none"
        ).to(DEVICE)
        model = BGAD(half, (self.size, self.size)).eval().requires_grad_(False).to(DEVICE)
        for level in range(len(self.flows)):
            model.flow(level).load_state_dict(self.flows[level].state_dict())
            model.flow(level).freeze()
        model.set_calibration(self.model.calibration())
        return lambda: model.predict(self.images).anomaly_map

    def prepare(self, name: str) -> Callable[[], Tensor]:
        if name == KERNELS:
            kernels_or_skip()
        if name == BFLOAT16:
            if DEVICE.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
                raise SkippedError("this CPU has no bfloat16 instructions")
            return self.fast_half()
        return {OFFICIAL: self.official, PORTABLE: partial(self.fast, "torch"), KERNELS: partial(self.fast, "triton")}[
            name
        ]


def image_inference(backbone: str, size: int, batch: int, **options) -> Comparison:
    pipelines = functools.cache(lambda: Pipelines(backbone, size, batch))

    def prepare(name: str) -> Contender:
        call = pipelines().prepare(name)
        exact = pipelines().exact

        def error() -> float:
            return float((call().double() - exact).abs().max() / exact.abs().max())

        return Contender(call, error, TOLERANCE.get(name, HALF_TOLERANCE))

    return Comparison(
        f"image inference, {backbone}, {batch} of {size} pixels",
        OFFICIAL,
        {name: partial(prepare, name) for name in (OFFICIAL, BFLOAT16, PORTABLE, KERNELS)},
        sizes={"pixels": size, "batch": batch},
        images=batch,
        memory=True,
        **options,
    )


def flow_at_high_resolution(size: int, **options) -> Comparison:
    """The flows and the scoring of one image, for the memory they take beyond the backbone's own activations."""

    @functools.cache
    def levels() -> list[tuple[ConditionalFlow, Tensor]]:
        generator = torch.Generator().manual_seed(size)
        made = []
        for channels, stride in LEVELS:
            side = size // stride
            flow = ConditionalFlow(FlowSpec(channels)).to(DEVICE).requires_grad_(False).freeze()
            made.append((flow, torch.randn(1, channels, side, side, generator=generator).to(DEVICE)))
        return made

    def call(impl: Impl) -> Tensor:
        with torch.no_grad():
            found = [flow.log_likelihood_map(maps, impl=impl) for flow, maps in levels()]
            most = torch.stack([lp.max() for lp in found])
            return score_map(found, (size, size), most, torch.zeros((), device=DEVICE), impl=impl).anomaly_map

    def prepare(name: str) -> Contender:
        if name == KERNELS:
            kernels_or_skip()
        impl: Impl = "triton" if name == KERNELS else "torch"

        def error() -> float:
            """The first line of patches of every level: those of the top rows of the image."""
            worst = 0.0
            for flow, maps in levels():
                rows = maps[0, :, 0].T
                with torch.no_grad():
                    found = flow.log_likelihood_map(maps, impl=impl)[0, 0]
                    dense = PositionalRows(1, len(rows)).dense(len(rows), torch.float64, rows.device)
                    z, log_det = reference.flow_forward(rows.double(), double(flow.weights()), flow.spec, dense)
                    truth = reference.log_likelihood(z, log_det)
                worst = max(worst, float((found.double() - truth).abs().max() / truth.abs().max()))
            return worst

        return Contender(partial(call, impl), error, TOLERANCE[name])

    return Comparison(
        f"flow and scoring of a high-resolution image, {size} pixels",
        PORTABLE,
        {name: partial(prepare, name) for name in (PORTABLE, KERNELS)},
        sizes={"pixels": size, "gigaflops": round(image_flops(size) / 1e9)},
        images=1,
        memory=True,
        **options,
    )


def comparisons() -> list[Comparison]:
    return [
        image_inference(B6, 256, 1, rounds=15, warmup=2, track=True),
        image_inference(B6, 256, 4, rounds=7),
        image_inference(B6, 256, 8, rounds=7),
        image_inference(B6, 512, 1, rounds=7),
        image_inference(B6, 1024, 1, rounds=7),
        *(flow_at_high_resolution(size, rounds=3) for size in (512, 1024, 2048, 4096)),
    ]


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda comparison: comparison.name)
def test_inference(comparison: Comparison, benchmark, capsys) -> None:
    run(comparison, benchmark, capsys)
