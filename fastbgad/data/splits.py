"""The split of a category: training normals, known anomalies and the test set.

BGAD learns from all normal images and a few anomalous ones. These are taken out of the test set, as in the paper, so
that no image is both learned from and measured on. A dataset that sets anomalous images aside for training keeps its
whole test set.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError, DataError
from ..wording import did_you_mean
from .sample import Category, Sample

USUAL_KNOWN = 10
"""Known anomalies of the paper, and the most that are drawn where no number is given."""


@dataclass(frozen=True)
class Split:
    """A category divided for training and test; no sample is in two parts."""

    normals: tuple[Sample, ...]
    known_anomalies: tuple[Sample, ...]
    test: tuple[Sample, ...]


def split_known_anomalies(
    category: Category,
    num_anomalies: int | None = None,
    per_type: bool = False,
    seed: int = 0,
    types: Sequence[str] | None = None,
) -> Split:
    """Draw the known anomalies from the test set and remove them from it.

    Where the category has anomalous images for training (`known`), they are drawn from these and the test set stays as
    it is. In the official code `num_anomalies` means "of each type" in one dataset class and "in total" in another;
    here `per_type` says which. The draw depends on the seed and on the sorted file names alone; with `per_type` the
    draw from one type does not depend on the other types.

    Args:
        category: an opened category.
        num_anomalies: how many to draw; 0 gives none (NFAD). None: 10, or half of those there are, rounded down, where
            that is fewer (with `per_type` of each type; all there are of `known` ones); none of a category without
            anomalous images.
        per_type: draw this many of each type instead of in total.
        seed: of the draw.
        types: the anomaly types to draw from (the setting where only some are known); all if None. The others stay
            in the test set.

    Raises:
        ConfigError: `num_anomalies` or `seed` is negative, or `types` is empty.
        DataError: an unknown type, fewer anomalies than asked for, none left for the test, or too few for a half.
    """
    if (num_anomalies or 0) < 0 or seed < 0:
        raise ConfigError(f"num_anomalies is {num_anomalies} and seed is {seed}; give numbers of at least 0")
    groups = _groups(category, per_type, seed, types)
    if num_anomalies is None:
        # A half leaves some for the test; of images that the test set does not hold all may be known.
        numbers = [min(USUAL_KNOWN, len(g.samples) if category.known else len(g.samples) // 2) for g in groups]
        if any(group.samples for group in groups) and not sum(numbers):
            raise _too_few(category, groups)
    else:
        numbers = [num_anomalies] * len(groups)
        if any(len(group.samples) < num_anomalies for group in groups) or (num_anomalies and not groups):
            raise _fewer_than_asked_for(category, groups, num_anomalies, per_type)
    known = {
        group.samples[index]
        for group, number in zip(groups, numbers, strict=True)
        for index in np.random.default_rng(group.entropy).permutation(len(group.samples))[:number]
    }
    test = tuple(sample for sample in category.test if sample not in known)
    if len(test) < len(category.test) and not any(sample.label for sample in test):
        raise DataError(
            f"all {len(known)} anomalous images of {category.root} would be used in training and none is left for the "
            "test; lower num_anomalies"
        )
    return Split(category.train, tuple(sample for sample in known_pool(category) if sample in known), test)


def known_pool(category: Category) -> tuple[Sample, ...]:
    """Return the anomalous images that known anomalies are drawn from, in the order of the category."""
    return tuple(sample for sample in category.known or category.test if sample.label)


class _Group(NamedTuple):
    """Images that are drawn from together."""

    samples: list[Sample]
    entropy: list[int]


def _groups(category: Category, per_type: bool, seed: int, types: Sequence[str] | None) -> list[_Group]:
    pool = known_pool(category)
    chosen = _known_types(category, tuple(sorted({sample.defect for sample in pool})), types)
    by_type = {defect: [sample for sample in pool if sample.defect == defect] for defect in chosen}
    if per_type:
        return [_Group(samples, [seed, *os.fsencode(defect)]) for defect, samples in by_type.items()]
    return [_Group([sample for samples in by_type.values() for sample in samples], [seed])]


def _known_types(category: Category, present: tuple[str, ...], types: Sequence[str] | None) -> tuple[str, ...]:
    if types is None:
        return present
    if isinstance(types, str) or not types:
        raise ConfigError(f"types is {types!r}; give a list of anomaly types, or None for all of them")
    for name in types:
        if name not in present:
            hint = did_you_mean(name, present)
            held = f"it holds {', '.join(present)}" if present else "it holds no anomalous images"
            raise DataError(f"{category.root} has no anomaly type {name!r}; {hint}{held}")
    return tuple(sorted(set(types)))


def _fewer_than_asked_for(category: Category, groups: Sequence[_Group], asked: int, per_type: bool) -> DataError:
    samples = [sample for group in groups for sample in group.samples]
    if not samples:
        return DataError(
            f"num_anomalies is {asked} but {category.root} has no anomalous images; add some, or train with --method "
            'nfad (in Python method="nfad" and num_anomalies=0), which needs none'
        )
    counts = Counter(sample.defect for sample in samples)
    listing = ", ".join(f"{defect} {number}" for defect, number in counts.items())
    counted = "per type" if per_type else "in total"
    return DataError(
        f"num_anomalies is {asked} {counted} but {category.root} has {len(samples)} anomalous images ({listing}); "
        "ask for fewer"
    )


def _too_few(category: Category, groups: Sequence[_Group]) -> DataError:
    """Return the error for groups of one image at most, half of which is none."""
    samples = [sample for group in groups for sample in group.samples]
    if len(known_pool(category)) == 1:
        return DataError(
            f"{category.root} has only one anomalous image, {samples[0].name}, which cannot be in training and in the "
            'test; add another, or train with --method nfad (in Python method="nfad" and num_anomalies=0), which '
            "needs none"
        )
    if len(samples) == 1:
        of, remedy = f"of {samples[0].defect}", "set num_anomalies to 1 to train on it"
    else:
        of, remedy = "of each type", "draw in total instead of per type"
    return DataError(f"{category.root} has only one anomalous image {of}, and half of that is none; {remedy}")
