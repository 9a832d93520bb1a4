"""The recall that a limit on false alarms leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastbgad.errors import MetricError


def recall_at_false_alarms(
    scores: Sequence[float] | np.ndarray,  # [n], higher is more anomalous
    labels: Sequence[bool] | np.ndarray,  # [n], true for anomalous
    limit: float = 0.01,
) -> float:
    """Return the largest share of anomalous images found by a threshold that alarms at most `limit` of the normal.

    An image raises an alarm if its score is above the threshold, so images with equal scores do so together. Of n
    normal images k may raise one, k the largest whole number with k / n <= limit. The best threshold is the (k + 1)-th
    largest normal score: a lower one would alarm at least k + 1 of them.

    Raises:
        MetricError: scores that are NaN, lengths that differ, one class only, or a limit outside [0, 1].
    """
    values, anomalous = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if values.ndim != 1 or values.shape != anomalous.shape:
        raise MetricError(f"{values.shape} scores but {anomalous.shape} labels; give one of each per image")
    if np.isnan(values).any():
        raise MetricError("the scores contain NaN; check the features or the training")
    if anomalous.all() or not anomalous.any():
        raise MetricError("recall needs normal and anomalous images; add the missing kind to the test")
    if not 0 <= limit <= 1:
        raise MetricError(f"the limit on false alarms is {limit}; it is a share between 0 and 1")
    normal = np.sort(values[~anomalous])[::-1]
    allowed = math.floor(limit * normal.size)
    # The product may have been rounded down past a whole number: 0.29 * 100 < 29.
    if (allowed + 1) / normal.size <= limit:
        allowed += 1
    if allowed >= normal.size:
        return 1.0
    return float(np.mean(values[anomalous] > normal[allowed]))
