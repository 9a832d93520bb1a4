"""A model measured on test samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import Sample, stream_batches
from ..errors import DataError, check_choice
from ..model.detector import BGAD
from ..model.scoring import Calibration, official_anomaly_maps
from .metrics import Metrics, evaluate

CalibrationName = Literal["training", "official"]


class Evaluation(NamedTuple):
    """Results of testing a model on n samples, on the CPU."""

    metrics: Metrics
    samples: tuple[Sample, ...]
    image_scores: Tensor  # [n] float32
    maps: Tensor  # [n, H, W] float32
    decisions: Tensor  # [n, H, W] uint8, sides of the explicit boundary
    masks: Tensor  # [n, H, W] bool
    levels: tuple[Tensor, ...]  # per level lp [n, h_l, w_l] float32


def evaluate_model(
    model: BGAD,
    samples: Sequence[Sample],
    *,
    calibration: CalibrationName = "training",
    pro_limit: float = 0.3,
    batch_size: int = 16,
    workers: int = 2,
    on_images: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score test samples and compute image AUROC, pixel AUROC and exact AUPRO.

    Args:
        model: a trained model. One without calibration can only be measured with the official one, and decides
            nothing: all sides are 0.
        samples: normal and anomalous test samples.
        calibration: "training": the model's own constants; "official": each level's maximum over these samples, as
            the official code has it (its scores then depend on the samples; decisions always use the model's own).
        pro_limit: largest false-positive rate of the AUPRO integral.
        batch_size: images that go through the model together.
        workers: threads that decode images.
        on_images: called with the number of images of every finished batch.

    Raises:
        MetricError: normal or anomalous samples only. DataError: an unusable image or mask.
        FeatureError: `calibration` is "training" and the model has none.
    """
    check_choice("calibration", calibration, CalibrationName)
    if not samples:
        raise DataError("there is no test image to evaluate on")
    if calibration == "official" and not model.calibrated:
        constants = _no_calibration(model)
    else:
        constants = model.calibration()
    maps, decisions, masks, levels = [], [], [], []
    for batch in stream_batches(samples, model.image_size, batch_size, workers):
        with torch.inference_mode():
            prediction = model.decide(model(batch.images), calibration=constants)
        maps.append(prediction.anomaly_map.cpu())
        decisions.append(prediction.decision.cpu())
        masks.append(batch.masks)
        levels.append([lp.cpu() for lp in prediction.log_likelihoods])
        if on_images is not None:
            on_images(len(batch.samples))
    level_maps = tuple(torch.cat(parts) for parts in zip(*levels, strict=True))
    anomaly_maps = torch.cat(maps)
    if calibration == "official":
        anomaly_maps = official_anomaly_maps(level_maps, model.image_size)
    image_scores = anomaly_maps.amax(dim=(1, 2))
    labels = np.array([sample.label for sample in samples], dtype=bool)
    all_masks = torch.cat(masks)
    metrics = evaluate(anomaly_maps, all_masks, image_scores, labels, pro_limit)
    return Evaluation(metrics, tuple(samples), image_scores, anomaly_maps, torch.cat(decisions), all_masks, level_maps)


def _no_calibration(model: BGAD) -> Calibration:
    """Return constants for a model without calibration: nothing lies beyond a boundary that is NaN."""
    levels = model.level_max
    return Calibration(torch.zeros_like(levels), levels.new_zeros(()), levels.new_full((len(levels), 2), torch.nan))


def metrics_dict(metrics: Metrics) -> dict[str, float]:
    """Return the metrics as plain numbers, for JSON."""
    return {name: float(value) for name, value in metrics._asdict().items()}


def false_alarms(model: BGAD, evaluation: Evaluation) -> dict[str, float]:
    """Return the shares of normal and of anomalous images beyond b_n and beyond b_a.

    Empty for a model without calibration, which has no boundary.
    """
    if not model.calibrated:
        return {}
    labels = torch.tensor([sample.label for sample in evaluation.samples], dtype=torch.bool)
    shares = {}
    for name, edge in zip(("b_n", "b_a"), model.thresholds(), strict=True):
        beyond = (evaluation.image_scores > edge).float()
        shares[f"normal_images_beyond_{name}"] = float(beyond[~labels].mean())
        shares[f"anomalous_images_beyond_{name}"] = float(beyond[labels].mean())
    return shares
