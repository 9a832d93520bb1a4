"""A model measured on test samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import Sample, load_sample, stream_batches
from ..errors import DataError, check_choice
from ..model.detector import BGAD
from ..model.scoring import Calibration, official_anomaly_maps
from .metrics import Metrics, measure

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

    @property
    def has_truth(self) -> Tensor:
        """Bool [n]: False for anomalous images without a mask, whose row of `masks` does not tell their truth."""
        return torch.tensor([tells_truth(sample) for sample in self.samples], dtype=torch.bool)


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

    What the samples do not define is NaN: image AUROC needs normal and anomalous samples, the others need masks with
    anomalous pixels. Anomalous samples without a mask count for image AUROC alone. `not_measured` says why.

    Args:
        model: a trained model. One without calibration can only be measured with the official one, and decides
            nothing: all sides are 0.
        samples: test samples, normal or anomalous, with masks or without.
        calibration: "training": the model's own constants; "official": each level's maximum over these samples, as
            the official code has it (its scores then depend on the samples; decisions always use the model's own).
        pro_limit: largest false-positive rate of the AUPRO integral.
        batch_size: images that go through the model together.
        workers: threads that decode images.
        on_images: called with the number of images of every finished batch.

    Raises:
        DataError: an unusable image or mask, or no samples.
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
    load = partial(load_sample, size=model.image_size, needs_mask=False)
    for batch in stream_batches(samples, model.image_size, batch_size, workers, load):
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
    has_truth = [tells_truth(sample) for sample in samples]
    metrics = measure(anomaly_maps, all_masks, image_scores, labels, pro_limit, has_truth)
    return Evaluation(metrics, tuple(samples), image_scores, anomaly_maps, torch.cat(decisions), all_masks, level_maps)


def _no_calibration(model: BGAD) -> Calibration:
    """Return constants for a model without calibration: nothing lies beyond a boundary that is NaN."""
    levels = model.level_max
    return Calibration(torch.zeros_like(levels), levels.new_zeros(()), levels.new_full((len(levels), 2), torch.nan))


def tells_truth(sample: Sample) -> bool:
    """Return True if every pixel of a sample is known to be normal or anomalous."""
    return sample.label == 0 or sample.mask is not None


def not_measured(evaluation: Evaluation) -> str:
    """Return a sentence that says which metrics are not defined, or leave images out, and why; empty if none."""
    anomalous = [sample for sample in evaluation.samples if sample.label]
    if not anomalous:
        return "AUROC and AUPRO need anomalous test images, and there are none."
    masks, maskless = evaluation.masks[evaluation.has_truth], sum(sample.mask is None for sample in anomalous)
    height, width = evaluation.masks.shape[1:]
    reasons = []
    if len(anomalous) == len(evaluation.samples):
        reasons.append("image AUROC needs normal test images, and there are none")
    if maskless == len(anomalous):
        reasons.append("pixel AUROC and AUPRO need masks of anomalous images, and there are none")
    elif not masks.any():
        reasons.append(f"pixel AUROC and AUPRO need anomalous pixels, and no mask has one at {height} x {width}")
    elif masks.all():
        reasons.append("pixel AUROC and AUPRO need normal pixels, and there are none")
    elif maskless:
        reasons.append(
            f"pixel AUROC and AUPRO leave out {maskless} of {len(anomalous)} anomalous images, which have no mask"
        )
    sentence = "; ".join(reasons)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def metrics_dict(metrics: Metrics) -> dict[str, float | None]:
    """Return the metrics as plain numbers, for JSON; None for those that were not defined."""
    return {name: None if math.isnan(value) else float(value) for name, value in metrics._asdict().items()}


def false_alarms(model: BGAD, evaluation: Evaluation) -> dict[str, float]:
    """Return the shares of normal and of anomalous images beyond b_n and beyond b_a.

    Without those of a class that has no images. Empty for a model without calibration, which has no boundary.
    """
    if not model.calibrated:
        return {}
    labels = torch.tensor([sample.label for sample in evaluation.samples], dtype=torch.bool)
    shares = {}
    for name, edge in zip(("b_n", "b_a"), model.thresholds(), strict=True):
        beyond = (evaluation.image_scores > edge).float()
        for kind, chosen in (("normal", ~labels), ("anomalous", labels)):
            if chosen.any():
                shares[f"{kind}_images_beyond_{name}"] = float(beyond[chosen].mean())
    return shares
