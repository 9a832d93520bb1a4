"""Calibration of a model from normal images, read from their files or from stored features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import LossConfig, TrainConfig
from ..data import Sample, stream_batches
from ..errors import DataError, FeatureError
from ..features.store import FeatureStore
from ..ops.boundary.dispatcher import check_boundary_options
from ..ops.dispatch import compute_dtype
from .detector import BGAD
from .scoring import Calibration, LevelWeights, calibrate, level_weights


@torch.inference_mode()
def calibrate_model(
    model: BGAD,
    normals: Sequence[Sample],
    *,
    beta: float = LossConfig.beta,
    tau: float = LossConfig.tau,
    weights: LevelWeights = "equal",
    batch_size: int = 16,
    workers: int = 2,
    on_images: Callable[[int], None] | None = None,
) -> None:
    """Calibrate a model on normal images, as training does at its end.

    Args:
        model: calibrated in place; what it had before is replaced.
        normals: normal images, best those that the flows were trained on.
        beta: the boundary is this fraction's percentile of the normal log-likelihoods, in (0, 1).
        tau: margin between the normal and the anomalous boundary, in units of log-likelihood / normalizer.
        weights: of the levels in the anomaly map, equal as in the code that a converted model comes from.
        batch_size: images that go through the model together.
        workers: threads that decode images.
        on_images: called with the number of images of every finished batch.

    Raises:
        DataError: no image, or one that cannot be used. ConfigError: beta or tau out of range.
        FeatureError: log-likelihoods that are not finite.
    """
    if not normals:
        raise DataError("there is no normal image to calibrate on")
    check_boundary_options(beta, tau, model.normalizer)
    batches = []
    for batch in stream_batches(normals, model.image_size, batch_size, workers):
        batches.append([lp.cpu() for lp in model(batch.images)])
        if on_images is not None:
            on_images(len(batch.samples))
    levels = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    if not all(bool(torch.isfinite(lp).all()) for lp in levels):
        raise FeatureError(
            "the log-likelihoods of the normal images contain NaN or Inf; check that the backbone and the image size "
            "are those that the flows were trained with"
        )
    factors = level_weights(weights, model.backbone.channels)
    model.set_calibration(
        calibrate(levels, model.image_size, beta=beta, tau=tau, normalizer=model.normalizer, weights=factors)
    )


def calibration_of(model: BGAD, levels: Sequence[Tensor], config: TrainConfig) -> Calibration:
    """Return the constants of a model that was trained with a configuration.

    Args:
        model: decides image size and channels of the levels; its own constants are neither read nor set.
        levels: per level lp [n, h_l, w_l] of all training normals.
        config: boundary and weights of the levels.
    """
    loss = config.loss
    return calibrate(
        levels,
        model.image_size,
        beta=loss.beta,
        tau=loss.tau,
        normalizer=loss.normalizer,
        weights=level_weights(config.score.level_weights, model.backbone.channels),
    )


@torch.inference_mode()
def stored_log_likelihoods(model: BGAD, store: FeatureStore, slots: Sequence[int], batch_size: int) -> list[Tensor]:
    """Return per level lp [n, h_l, w_l] of images whose features are stored, `batch_size` at a time."""
    parts = [slots[start : start + batch_size] for start in range(0, len(slots), batch_size)]
    dtype = compute_dtype(store.levels[0])
    levels = []
    for level, (_, height, width) in enumerate(store.shapes):
        none = torch.empty(0, height, width, dtype=dtype, device=store.device)
        maps = [model.flow(level).log_likelihood_map(store.maps(level, part)) for part in parts]
        levels.append(torch.cat([none, *maps]))
    return levels
