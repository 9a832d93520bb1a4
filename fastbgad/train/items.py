"""The images of a training run: their numbers, those that this process holds, and the slots of their features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import TrainConfig
from ..data import AnomalySynthesis, AugmentedAnomalies, DecodedImages, Sample, Split
from ..errors import DataError, Notice
from ..wording import count
from .data_parallel import DataParallel


def check_images(split: Split, config: TrainConfig) -> None:
    """Raise `DataError` for images that a method cannot be trained on; none is read."""
    if not split.normals:
        raise DataError("there is no normal image to train on")
    if not config.uses_anomalies:
        return
    other = 'train with --method nfad (in Python method="nfad"), which needs none'
    if not split.known_anomalies:
        there = any(sample.label for sample in split.test)
        remedy = f"raise num_anomalies, or {other}" if there else f"add anomalous images with masks, or {other}"
        raise DataError(f"method {config.method!r} learns from anomalies, but none is known: {remedy}")
    maskless = [sample.image for sample in split.known_anomalies if sample.mask is None]
    if maskless:
        raise DataError(
            f"method {config.method!r} learns from anomalous pixels, but there is no mask of {len(maskless)} of "
            f"{count(len(split.known_anomalies), 'known anomaly', 'known anomalies')}, such as {maskless[0]}: "
            f"add masks, or {other}"
        )


def without_vanished(split: Split, config: TrainConfig, decoded: DecodedImages) -> Split:
    """Leave known anomalies out of which no pixel is left at the model's size: they would train as normal images.

    Raises:
        DataError: none is left.
    """
    if not config.uses_anomalies:
        return split
    known = split.known_anomalies
    kept = tuple(sample for sample in known if bool(decoded(sample).mask.any()))
    size = f"{decoded.size[0]} x {decoded.size[1]} pixels"
    if not kept:
        raise DataError(
            f"no mask of the {count(len(known), 'known anomaly', 'known anomalies')} has a pixel left at {size}, so "
            f"that method {config.method!r} has nothing to learn from: choose a larger image size (--image-size), or "
            'train with --method nfad (in Python method="nfad"), which needs no masks'
        )
    if len(kept) < len(known):
        warnings.warn(
            f"{len(known) - len(kept)} of {len(known)} known anomalies are left out of the training: their masks "
            f"vanish at {size}, so that they would train as normal images",
            Notice,
            stacklevel=2,
        )
    return replace(split, known_anomalies=kept)


class RunItems:
    """The images of a run, numbered as items: normals, known anomalies, then what is synthesized from them.

    Args:
        split: training normals and known anomalies.
        config: decides whether anomalies are used, and how often.
        image_size: (height, width) in pixels.
        decoded: cache of decoded images.
        parallel: the processes that share the run, each of which holds some of the items; None for one alone.

    Attributes:
        anomalies: the plan of the anomalous images of a pass.
        files: the items that are files: normals, then known anomalies.
        normal_count: number of normals.
        own_files: the files that this process holds.
        own_synthetic: the indices in `anomalies` of the synthesized items that this process holds.
        first_phase: int64, the items of a pass of phase one.
        second_phase: int64, the items of a pass of phase two; known anomalies are repeated.
        slots: int64 [items], the slot of each item in this process's store; -1 for items without features in it.
    """

    def __init__(
        self,
        split: Split,
        config: TrainConfig,
        image_size: tuple[int, int],
        decoded: DecodedImages,
        parallel: DataParallel | None = None,
    ) -> None:
        known = split.known_anomalies if config.uses_anomalies else ()
        recipe = AnomalySynthesis(repeat=config.anomalies.repeat, cut_paste=config.anomalies.cut_paste)
        self.anomalies: AugmentedAnomalies = AugmentedAnomalies(
            known, split.normals, recipe, image_size, config.seed, decoded
        )
        self.files: list[Sample] = [*split.normals, *known]
        self.normal_count: int = len(split.normals)
        synthetic = [index for index in range(len(self.anomalies)) if self.anomalies.is_synthetic(index)]
        self.first_phase: Tensor = torch.arange(self.normal_count)
        self.second_phase: Tensor = torch.cat([self.first_phase, self._anomalous_items(known, synthetic)])

        numbers = range(len(self.files) + len(synthetic))
        held = parallel.owned(numbers) if parallel is not None else list(numbers)
        self._own_file_items = [item for item in held if item < len(self.files)]
        self._own_synthetic_items = [item for item in held if item >= len(self.files)]
        self.own_files: list[Sample] = [self.files[item] for item in self._own_file_items]
        self.own_synthetic: list[int] = [synthetic[item - len(self.files)] for item in self._own_synthetic_items]
        self.slots: Tensor = torch.full((len(numbers),), -1)

    def set_file_slots(self, slots: Sequence[int]) -> None:
        """Store the slots of `own_files`."""
        self.slots[self._own_file_items] = torch.tensor(slots, dtype=torch.int64)

    def set_synthetic_slots(self, slots: Sequence[int]) -> None:
        """Store the slots of `own_synthetic`."""
        self.slots[self._own_synthetic_items] = torch.tensor(slots, dtype=torch.int64)

    def _anomalous_items(self, known: Sequence[Sample], synthetic: Sequence[int]) -> Tensor:
        """Return the item int64 [n] of every anomalous image of a pass, repeated and synthesized ones."""
        synthetic_item = {index: len(self.files) + k for k, index in enumerate(synthetic)}
        known_item = {sample: self.normal_count + k for k, sample in enumerate(known)}
        items = [
            synthetic_item.get(index, known_item[self.anomalies.source(index)]) for index in range(len(self.anomalies))
        ]
        return torch.tensor(items, dtype=torch.int64)
