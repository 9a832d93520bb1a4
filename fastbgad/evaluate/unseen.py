"""The test images that a model was not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..data import Sample
from ..data.content import image_digests
from ..wording import count

KNOWN_NAMES = "known_anomalies"
"""Entry of a model's history: the names of its known anomalies."""
KNOWN_FILES = "known_anomaly_files"
"""Entry of a model's history: the SHA-256 of every known anomaly's image file, by name."""


class Unseen(NamedTuple):
    """Test images without a model's known anomalies."""

    samples: tuple[Sample, ...]
    explanation: str  # how many were left out and why; empty if none were


def unseen_samples(history: Mapping[str, Any], samples: Sequence[Sample]) -> Unseen:
    """Leave out the test images that a model was trained on as known anomalies, whatever their names are.

    They are recognized by the bytes of their files. The history of a model that was trained by an earlier version has
    no digests: then names decide, which other images may share.

    Args:
        history: of the model.
        samples: test images.

    Raises:
        DataError: an image cannot be read.
    """
    if KNOWN_FILES in history:
        known = set(history[KNOWN_FILES].values())
        seen = [digest in known for digest in image_digests(samples)] if known else [False] * len(samples)
    else:
        names = set(history.get(KNOWN_NAMES, ()))
        seen = [sample.name in names for sample in samples]
    left = tuple(sample for sample, is_seen in zip(samples, seen, strict=True) if not is_seen)
    if not any(seen):
        return Unseen(left, "")
    images = count(sum(seen), "test image")
    if KNOWN_FILES in history:
        return Unseen(left, f"{images} that the model was trained on (same content as its known anomalies)")
    names_of = "the name of a known anomaly" if sum(seen) == 1 else "the names of known anomalies"
    return Unseen(
        left,
        f"{images} with {names_of} of the model; its file is of an earlier version, without digests of their content, "
        "so that names alone decide",
    )
