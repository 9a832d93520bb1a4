"""The split of a category: training normals, known anomalies and the test set.

BGAD learns from all normal images and a few anomalous ones. These are taken out of the test set, as in the paper, so
that no image is both learned from and measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, DataError
from ..wording import did_you_mean
from .sample import Category, Sample


@dataclass(frozen=True)
class Split:
    """A category divided for training and test; no sample is in two parts."""

    normals: tuple[Sample, ...]
    known_anomalies: tuple[Sample, ...]
    test: tuple[Sample, ...]


def split_known_anomalies(
    category: Category,
    num_anomalies: int = 10,
    per_type: bool = False,
    seed: int = 0,
    types: Sequence[str] | None = None,
) -> Split:
    """Draw the known anomalies from the test set and remove them from it.

    In the official code `num_anomalies` means "of each type" in one dataset class and "in total" in another; here
    `per_type` says which. The draw depends on the seed and on the sorted file names alone; with `per_type` the draw
    from one type does not depend on the other types.

    Args:
        category: an opened category.
        num_anomalies: how many to draw; 0 gives none (NFAD).
        per_type: draw this many of each type instead of in total.
        seed: of the draw.
        types: the anomaly types to draw from (the setting where only some are known); all if None. The others stay
            in the test set.

    Raises:
        ConfigError: `num_anomalies` or `seed` is negative, or `types` is empty.
        DataError: an unknown type, fewer anomalies than asked for, or none left for the test.
    """
    if num_anomalies < 0 or seed < 0:
        raise ConfigError(f"num_anomalies is {num_anomalies} and seed is {seed}; give numbers of at least 0")
    by_type = {defect: [s for s in category.test if s.defect == defect and s.label] for defect in category.defects}
    chosen_types = _known_types(category, types)
    if per_type:
        groups = [(by_type[defect], [seed, *defect.encode()]) for defect in chosen_types]
    else:
        groups = [([sample for defect in chosen_types for sample in by_type[defect]], [seed])]
    if any(len(samples) < num_anomalies for samples, _ in groups):
        counts = ", ".join(f"{defect} {len(by_type[defect])}" for defect in chosen_types)
        total = sum(len(by_type[defect]) for defect in chosen_types)
        counted = "per type" if per_type else "in total"
        raise DataError(
            f"num_anomalies is {num_anomalies} {counted} but {category.root} has {total} anomalous images ({counts}); "
            "ask for fewer"
        )
    known = {
        samples[index]
        for samples, entropy in groups
        for index in np.random.default_rng(entropy).permutation(len(samples))[:num_anomalies]
    }
    test = tuple(sample for sample in category.test if sample not in known)
    if not any(sample.label for sample in test):
        raise DataError(
            f"all {len(known)} anomalous images of {category.root} would be used in training and none is left for the "
            "test; lower num_anomalies"
        )
    return Split(category.train, tuple(sample for sample in category.test if sample in known), test)


def _known_types(category: Category, types: Sequence[str] | None) -> tuple[str, ...]:
    if types is None:
        return category.defects
    if isinstance(types, str) or not types:
        raise ConfigError(f"types is {types!r}; give a list of anomaly types, or None for all of them")
    for name in types:
        if name not in category.defects:
            hint = did_you_mean(name, category.defects)
            raise DataError(
                f"{category.root} has no anomaly type {name!r}; {hint}it holds {', '.join(category.defects)}"
            )
    return tuple(sorted(set(types)))
