"""Calibration at the end of a run, and the known anomalies beyond the boundaries that it sets."""

from __future__ import annotations

import warnings

from ..config import TrainConfig
from ..errors import Notice
from ..features import ImageFeatures
from ..model.calibration import calibration_of, stored_log_likelihoods
from ..model.detector import BGAD
from .data_parallel import DataParallel
from .items import RunItems


def calibrate_run(
    model: BGAD, config: TrainConfig, items: RunItems, features: ImageFeatures, parallel: DataParallel | None = None
) -> dict[str, int]:
    """Set the model's constants from all training normals.

    Returns:
        The number of known anomalies beyond b_n and beyond b_a, by name; empty for methods without any.
    """
    normals, count = items.normal_count, len(items.files)
    slots = features.slots(items.own_files)
    levels = stored_log_likelihoods(model, features.store, slots, config.schedule.batch_size)
    if parallel is not None:
        levels = [parallel.gather_images(lp, count) for lp in levels]
    model.set_calibration(calibration_of(model, [lp[:normals] for lp in levels], config))
    if normals == count:
        return {}
    side = model.decide([lp[normals:] for lp in levels]).image_side
    known_beyond = {name: int((side >= k).sum()) for k, name in ((1, "b_n"), (2, "b_a"))}
    if known_beyond["b_a"] == 0 and (parallel is None or parallel.rank == 0):
        warnings.warn(
            f"none of the {len(side)} known anomalies scores beyond the anomalous boundary b_a, so hardly any "
            "image will be decided to be anomalous; train longer (--schedule.meta-epochs), narrow the margin "
            f"(--loss.tau, now {config.loss.tau:g}), or go by the score",
            Notice,
            stacklevel=1,
        )
    return known_beyond
