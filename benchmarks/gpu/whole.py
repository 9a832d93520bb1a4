"""Train whole categories on the card, and time inference from image file to anomaly map."""

from __future__ import annotations

import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastbgad.backbones import create_backbone
from fastbgad.bench.images import generate_images
from fastbgad.bench.meter import ThroughputConfig, ThroughputMeter
from fastbgad.config import AnomalyConfig, ScheduleConfig, TrainConfig, demo_preset
from fastbgad.data import open_category, split_known_anomalies
from fastbgad.errors import FeatureError
from fastbgad.evaluate.evaluation import evaluate_model, metrics_dict
from fastbgad.model import BGAD
from fastbgad.ops import Impl
from fastbgad.train.fit import fit

from .category import write_category
from .context import Context, Found, Items

BACKBONE = "tf_efficientnet_b6"
# Two runs that differ in rounding and in nothing else end this close; one image of 16 moves the first by up to 0.016.
SAME = {"image_auroc": 0.05, "pixel_auroc": 0.01}


def items(context: Context) -> Items:
    """Return trainings and rows of `fastbgad bench`, those that most is asked of first."""
    if context.launch_only:
        return {"a short training": partial(_train, context, True)}
    found: dict[str, Any] = {"a category, short schedule": partial(_short, context)}
    if not context.tiny:
        found[f"a category, official schedule, {BACKBONE}"] = partial(_official, context)
    rows = [(64, 1)] if context.tiny else [(side, batch) for side in (1024, 2048, 4096) for batch in (1, 8)]
    for side, batch in rows:
        found[f"fastbgad bench, {side} px, batch {batch}"] = partial(_bench, context, side, batch)
    return found


def _short(context: Context) -> Found:
    """The same training on the card and on the CPU: equal AUROC, and how much faster."""
    on_card = _train(context, captured=True)
    if context.device.type == "cpu" or not context.may("the same on the CPU"):
        return {"outcome": "measured", "card": on_card}
    on_cpu = _train(context, captured=False, device="cpu", impl="torch")
    differences = {name: abs(on_card["metrics"][name] - on_cpu["metrics"][name]) for name in SAME}
    right = all(differences[name] < most for name, most in SAME.items())
    message = "" if right else f"AUROC on the card differs from that on the CPU: {differences}"
    return {"outcome": "measured" if right else "wrong", "message": message, "card": on_card, "cpu": on_cpu}


def _train(context: Context, captured: bool, device: str | None = None, impl: Impl = "auto") -> Found:
    """Train by the demo's schedule on Gabor features, and test."""
    normals, defects, side = (6, 4, 64) if context.tiny or context.launch_only else (32, 16, 256)
    config = demo_preset()
    if context.launch_only or not context.values:
        config = TrainConfig(
            schedule=ScheduleConfig(meta_epochs=2, sub_epochs=1, batch_size=8, warmup_epochs=1),
            anomalies=AnomalyConfig(num_anomalies=2, repeat=1, cut_paste=1),
        )
    if device is None:
        device, impl = str(context.device), "auto" if context.driver == "cuda" else "triton"
    backbone = create_backbone("gabor")
    return _trained(context, config, backbone, (normals, defects, side), device, impl, captured)


def _official(context: Context) -> Found:
    """The official schedule on a category of MVTec AD's size; random weights cost what trained ones do."""
    backbone = create_backbone(BACKBONE, weights="random")
    found = _trained(context, TrainConfig(), backbone, (209, 63, 256), str(context.device), "auto", True)
    return {"outcome": "measured", "card": found}


def _trained(
    context: Context,
    config: TrainConfig,
    backbone: Any,
    sizes: tuple[int, int, int],
    device: str,
    impl: Impl,
    captured: bool,
) -> Found:
    normals, defects, side = sizes
    with tempfile.TemporaryDirectory(prefix="fastbgad-gpu-") as scratch:
        folder = write_category(Path(scratch), normals, max(4, normals // 4), defects, side)
        known = min(config.anomalies.num_anomalies, defects // 2)
        split = split_known_anomalies(open_category(folder), known)
        model = BGAD(backbone, (side, side), flow=config.flow, seed=config.seed, impl=impl).to(device)
        with warnings.catch_warnings():
            if captured:  # a step that could not be captured must not pass for one that was
                warnings.filterwarnings("error", message="training steps cannot be captured")
            start = time.perf_counter()
            try:
                result = fit(model, split, config, workers=8)
            except FeatureError:
                if context.values:
                    raise
                return {"outcome": "measured", "device": device}  # a loss of numbers that nobody computed
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        found: Found = {
            "outcome": "measured",
            "seconds_of_training": seconds,
            "seconds_of_features": result.feature_seconds,
            "passes": len(result.history),
            "device": device,
        }
        if context.values:
            found["metrics"] = metrics_dict(evaluate_model(model, split.test).metrics)
        return found


def _bench(context: Context, side: int, batch: int) -> Found:
    """One row of `fastbgad bench` with new weights."""
    tiny = context.tiny
    config = ThroughputConfig(image_sizes=(side,), batch_sizes=(batch,), repeats=1 if tiny else 3, warmup=1, workers=8)
    backbone = create_backbone("gabor") if tiny else create_backbone(BACKBONE, weights="random")
    impl: Impl = "auto" if context.driver == "cuda" else "triton"
    meter = ThroughputMeter(backbone.to(context.device), config, context.device, impl=impl)
    with tempfile.TemporaryDirectory(prefix="fastbgad-gpu-") as scratch:
        row = meter.row(side, batch, generate_images(Path(scratch), side, 0))
    if not context.values:  # numbers that nobody computed are no calibration: it ends there
        return {"outcome": "measured"}
    if row.failed is not None:  # a card with more memory may do it
        return {"outcome": "skipped" if "memory" in row.failed else "failed", "message": row.failed}
    return {"outcome": "measured", "row": row.as_dict()}
