"""The features of a category's images: each image goes through the frozen backbone once, for every run that asks.

Runs that differ in method, seed or known anomalies share everything but the anomalies they synthesize: for those some
slots are kept spare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backbones import Backbone
from ..config import CellLabels
from ..data import Batch, DecodedImages, Sample, stream_batches
from ..errors import ConfigError
from .store import FeatureStore, Placement, extract_into

OnImages = Callable[[str, int, int, float], None]
"""Told a stage ("statistics", "features"), how many of its images are done, of how many, and how many a second."""


class ImageFeatures:
    """Features and masks of images by sample, extracted when first asked for.

    Args:
        backbone: the frozen feature extractor; one that needs statistics is fitted on `normals` first.
        image_size: (height, width) in pixels.
        samples: the images that may be asked for; nothing is read yet.
        normals: the images that a backbone which needs it is fitted on.
        spare: slots for images that are not files.
        device: where training runs.
        placement, folder, dtype, cell_labels: see `fastbgad.features.FeatureStore`.
        batch_size: images that go through the backbone together.
        workers: threads that decode images.
        decoded: where decoded images are kept.
        on_images: called after every batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        image_size: tuple[int, int],
        samples: Sequence[Sample],
        normals: Sequence[Sample],
        spare: int = 0,
        *,
        device: torch.device | str = "cpu",
        placement: Placement = "auto",
        folder: str | Path | None = None,
        dtype: torch.dtype | None = None,
        cell_labels: CellLabels = "nearest",
        batch_size: int = 32,
        workers: int = 2,
        decoded: DecodedImages | None = None,
        on_images: OnImages | None = None,
    ) -> None:
        self.backbone, self.image_size = backbone, image_size
        self.batch_size, self.workers, self.on_images = batch_size, workers, on_images
        self.decoded = decoded or DecodedImages(image_size)
        self._slots = {sample: slot for slot, sample in enumerate(dict.fromkeys(samples))}
        self._there: set[Sample] = set()
        self.device = torch.device(device)
        self._store_options: dict[str, Any] = {
            "device": device, "placement": placement, "folder": folder, "dtype": dtype, "cell_labels": cell_labels
        }  # fmt: skip
        self.store = self._new_store(spare)
        if backbone.needs_fit:
            self._learn_statistics(normals)

    @property
    def spare(self) -> range:
        """The slots for images that are not files."""
        return range(len(self._slots), self.store.slots)

    def reserve(self, spare: int) -> None:
        """Make room for at least so many images that are not files; features of files are kept."""
        if spare > len(self.spare):
            old, self.store = self.store, self._new_store(spare)
            self.store.copy_from(old, len(self._slots))
            old.close()

    @torch.inference_mode()
    def _learn_statistics(self, normals: Sequence[Sample]) -> None:
        """Fit the backbone on normal images.

        Where the store holds them all in their own precision, their features are kept as they are seen and standardized
        there, so that each image goes through the network once. In another one they would be rounded otherwise than
        those of later images: they are extracted again.
        """
        keep = all(sample in self._slots for sample in normals)

        def features() -> Iterator[Sequence[torch.Tensor]]:
            nonlocal keep
            for batch in self._batches(normals, "statistics"):
                levels = self.backbone.extract(batch.images.to(self.device))
                keep = keep and levels[0].dtype == self.store.dtype
                if keep:
                    self.store.put(self.slots(batch.samples), levels, batch.masks)
                yield levels

        self.backbone.fit_features(features())
        if keep:
            self.store.change(self.slots(normals), self.backbone.standardize_level)
            self._there.update(normals)

    def _new_store(self, spare: int) -> FeatureStore:
        return FeatureStore(self.backbone, self.image_size, len(self._slots) + spare, **self._store_options)

    def check(self, backbone: Backbone, image_size: tuple[int, int], cell_labels: CellLabels, spare: int) -> None:
        """Raise `ConfigError` unless these features serve a run with this backbone, size, labels and synthesis."""
        if backbone is not self.backbone or image_size != self.image_size or cell_labels != self.store.cell_labels:
            raise ConfigError("the features belong to another backbone, image size or kind of cell labels than the run")
        if spare > len(self.spare):
            raise ConfigError(f"the features have {len(self.spare)} spare slots but the run synthesizes {spare} images")

    def slots(self, samples: Sequence[Sample]) -> list[int]:
        """Return the slots of these images, which are among `samples`."""
        return [self._slots[sample] for sample in samples]

    def extract(self, samples: Sequence[Sample]) -> None:
        """Extract the features of these images, unless they are stored already; raise `DataError` or `FeatureError`."""
        missing = [sample for sample in dict.fromkeys(samples) if sample not in self._there]

        def batches() -> Iterator[tuple[Sequence[int], torch.Tensor, torch.Tensor]]:
            for batch in self._batches(missing, "features"):
                yield self.slots(batch.samples), batch.images, batch.masks

        extract_into(self.store, self.backbone, batches())
        self._there.update(missing)

    def close(self) -> None:
        """Free what the store keeps on disk."""
        self.store.close()

    def _batches(self, samples: Sequence[Sample], stage: str) -> Iterator[Batch]:
        clock, done = time.perf_counter(), 0
        for batch in stream_batches(samples, self.image_size, self.batch_size, self.workers, self.decoded):
            yield batch
            done += len(batch.samples)
            if self.on_images is not None:
                self.on_images(stage, done, len(samples), done / (time.perf_counter() - clock))
