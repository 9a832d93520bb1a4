"""A model measured on test samples, and what the report shows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..data import Sample, load_sample, stream_batches
from ..errors import ConfigError, DataError
from ..features.store import cell_mask
from ..model.detector import BGAD
from ..model.scoring import Calibration, official_anomaly_maps
from .metrics import Metrics, evaluate
from .report import ImageRow, LevelHistogram, RunReport

CalibrationName = Literal["training", "official"]


class Evaluation(NamedTuple):
    """Everything that testing a model on n samples gave, on the CPU."""

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
    """Scores test samples and computes image AUROC, pixel AUROC and exact AUPRO.

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
    if calibration not in get_args(CalibrationName):
        raise ConfigError(f"calibration is {calibration!r}; choose training or official")
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
    """Constants for a model without calibration: nothing lies beyond a boundary that is NaN."""
    levels = model.level_max
    return Calibration(torch.zeros_like(levels), levels.new_zeros(()), levels.new_full((len(levels), 2), torch.nan))


def metrics_dict(metrics: Metrics) -> dict[str, float]:
    """The metrics as plain numbers, for JSON."""
    return {name: float(value) for name, value in metrics._asdict().items()}


def image_rows(model: BGAD, evaluation: Evaluation) -> list[ImageRow]:
    """What the report shows of every test image."""
    return [
        ImageRow(
            name=sample.name,
            defect=sample.defect,
            label=sample.label,
            score=float(evaluation.image_scores[i]),
            image=load_sample(sample, model.image_size).image.permute(1, 2, 0).numpy(),
            mask=evaluation.masks[i].numpy(),
            anomaly_map=evaluation.maps[i].numpy(),
            decision=evaluation.decisions[i].numpy(),
        )
        for i, sample in enumerate(evaluation.samples)
    ]


def level_histograms(model: BGAD, evaluation: Evaluation) -> list[LevelHistogram]:
    """The test patches' log-likelihoods by level, normal apart from anomalous."""
    histograms = []
    for level, lp in enumerate(evaluation.levels):
        mask = cell_mask(evaluation.masks, (lp.shape[1], lp.shape[2]), "nearest")
        u = lp / model.normalizer
        b_n, b_a = model.boundaries[level].tolist()
        name = f"level {level + 1}, stride {model.backbone.strides[level]}"
        histograms.append(LevelHistogram(name, u[~mask].numpy(), u[mask].numpy(), b_n, b_a))
    return histograms


def run_report(
    category: str,
    method: str,
    model: BGAD,
    evaluation: Evaluation,
    *,
    history: Sequence[Mapping[str, float]] = (),
    seconds: float = float("nan"),
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> RunReport:
    """One method on one category, ready for `fastbgad.evaluate.report.write_report`.

    The map's colours run from the median score of the test pixels to the largest one: the same for every image.
    """
    sample = evaluation.maps.reshape(-1)[:: max(1, evaluation.maps.numel() // 1_000_000)]
    return RunReport(
        category=category,
        method=method,
        metrics=metrics_dict(evaluation.metrics),
        rows=image_rows(model, evaluation),
        levels=level_histograms(model, evaluation),
        history=history,
        seconds=seconds,
        map_range=(float(sample.median()), float(evaluation.maps.max())),
        config=config or {},
        versions=versions or {},
    )


def false_alarms(model: BGAD, evaluation: Evaluation) -> dict[str, float]:
    """How the explicit boundary decides images: the shares of normal and of anomalous images beyond b_n and b_a.

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
