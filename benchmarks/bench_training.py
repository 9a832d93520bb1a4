"""A whole training run, from image files to the metrics after every meta epoch: the official engine against `fit`.

    pytest benchmarks/bench_training.py

Both take the same schedule on the demo's photographs, start from the same weights, and learn from the same known
anomalies: four sub-epochs of normals, then four with three known anomalies used five times as they are and five times
cut and pasted, as the official commands do. What the official engine does is re-stated in `official_engine.py`. AUROCs
must agree before anything is timed. Takes some minutes.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import DEVICE, Comparison, Contender, SkippedError, run
from official_engine import EngineResult, OfficialEngine, fast_engine

from fastbgad.backbones import create_backbone
from fastbgad.config import AnomalyConfig, FlowConfig, Method, ScheduleConfig, TrainConfig
from fastbgad.data import Split, make_demo_dataset, open_category, split_known_anomalies, stream_batches
from fastbgad.model import BGAD
from fastbgad.ops import MatmulPrecision

OFFICIAL = "official engine's arithmetic"
FIT, FIT_BFLOAT16 = "fastbgad fit", "fastbgad fit, bfloat16 products"
# Of AUROCs: sub-epochs are shuffled differently, and one test image in 36 that changes places moves one by 0.003.
TOLERANCE = 0.02


class Run:
    """Images, an encoder and first weights, of which every contender takes a copy."""

    def __init__(self, method: Method, backbone: str, pixels: int, sub_epochs: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fastbgad-bench-")
        root = Path(self.folder.name)
        make_demo_dataset(root, seed=0)
        category = open_category(root, "brick", check="none")
        self.split: Split = split_known_anomalies(category, 3)
        self.size = (pixels, pixels)
        schedule = ScheduleConfig(meta_epochs=2, sub_epochs=sub_epochs, batch_size=16, lr=1e-3, warmup_epochs=1)
        self.config = TrainConfig(
            method=method, flow=FlowConfig(), schedule=schedule, anomalies=AnomalyConfig(num_anomalies=3)
        )
        options = {} if backbone == "gabor" else {"weights": "random"}
        self.encoder = create_backbone(backbone, (1, 2, 3), **options).to(DEVICE)
        if self.encoder.needs_fit:
            batches = stream_batches(self.split.normals, self.size, 8, 2)
            self.encoder.fit(batch.images.to(DEVICE) for batch in batches)

    def model(self, matmul_precision: MatmulPrecision) -> BGAD:
        return BGAD(self.encoder, self.size, flow=self.config.flow, matmul_precision=matmul_precision).to(DEVICE)

    def official(self) -> EngineResult:
        return OfficialEngine(self.encoder, self.model("float32"), self.split, self.config).run()

    def fast(self, matmul_precision: MatmulPrecision) -> EngineResult:
        return fast_engine(self.model(matmul_precision), self.split, self.config)


def training_run(method: Method, backbone: str, pixels: int, sub_epochs: int) -> Comparison:
    state = functools.cache(lambda: Run(method, backbone, pixels, sub_epochs))
    truth = functools.cache(lambda: state().official())

    def prepare(name: str) -> Contender:
        if name == FIT_BFLOAT16 and (DEVICE.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            raise SkippedError("this processor has no bfloat16 instructions")
        calls: dict[str, Callable[[], EngineResult]] = {
            OFFICIAL: lambda: state().official(),
            FIT: lambda: state().fast("float16"),
            FIT_BFLOAT16: lambda: state().fast("bfloat16"),
        }
        call = calls[name]

        def error() -> float:
            found, expected = call(), truth()
            return max(abs(found.image_auroc - expected.image_auroc), abs(found.pixel_auroc - expected.pixel_auroc))

        return Contender(call, None if name == OFFICIAL else error, TOLERANCE)

    return Comparison(
        f"training run, {method}, {backbone}, {pixels} pixels, 2 meta epochs of {sub_epochs} sub-epochs",
        OFFICIAL,
        {name: partial(prepare, name) for name in (OFFICIAL, FIT, FIT_BFLOAT16)},
        ours=(FIT, FIT_BFLOAT16),
        sizes={"pixels": pixels},
        rounds=1,
        warmup=0,
    )


def comparisons() -> list[Comparison]:
    return [training_run("bgad", "gabor", 288, 4)]


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda comparison: comparison.name)
def test_training(comparison: Comparison, benchmark, capsys) -> None:
    run(comparison, benchmark, capsys)
