"""The features of a category's images: each image goes through the frozen backbone once, for all runs that share them.

Runs that differ in method, seed or known anomalies share all features except those of synthesized anomalies, for which
there are spare slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..backbones import Backbone
from ..config import CellLabels
from ..data import Batch, DecodedImages, Sample, stream_batches
from ..errors import ConfigError
from .store import FeatureStore, StoreOptions, extract_into

OnImages = Callable[[str, int, int, float], None]
"""Called with the stage ("statistics", "features"), the images done, their total, and the images per second."""


@dataclass(frozen=True)
class ImageReading:
    """Options of reading images and extracting their features.

    Attributes:
        batch_size: images that go through the backbone together.
        workers: threads that decode images.
        decoded: cache of decoded images; None makes a new one.
        on_images: called after every batch.
    """

    batch_size: int = 32
    workers: int = 2
    decoded: DecodedImages | None = None
    on_images: OnImages | None = None


class ImageFeatures:
    """Features and masks of images by sample, extracted when first asked for.

    Args:
        backbone: the frozen feature extractor; one that needs statistics is fitted on `normals` first.
        image_size: (height, width) in pixels.
        samples: the images that may be asked for; nothing is read yet.
        normals: the images that a backbone which needs it is fitted on.
        spare: slots for images that are not files.
        store: options of the store that holds the features.
        reading: options of reading images.
    """

    def __init__(
        self,
        backbone: Backbone,
        image_size: tuple[int, int],
        samples: Sequence[Sample],
        normals: Sequence[Sample],
        spare: int = 0,
        *,
        store: StoreOptions | None = None,
        reading: ImageReading | None = None,
    ) -> None:
        reading = reading or ImageReading()
        self.backbone = backbone
        self.image_size = image_size
        self.batch_size: int = reading.batch_size
        self.workers: int = reading.workers
        self.on_images: OnImages | None = reading.on_images
        self.store: FeatureStore
        self.decoded: DecodedImages = reading.decoded or DecodedImages(image_size)
        self._slots = {sample: slot for slot, sample in enumerate(dict.fromkeys(samples))}
        self._stored: set[Sample] = set()
        self._store_options = store or StoreOptions()
        self.device: torch.device = torch.device(self._store_options.device)
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

        Where the store holds them all in the precision of the features, these are stored at once and standardized in
        the store, so that each image goes through the network once. In another precision they would be rounded in
        another way than those of later images: they are extracted again.
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
            self._stored.update(normals)

    def _new_store(self, spare: int) -> FeatureStore:
        return FeatureStore(self.backbone, self.image_size, len(self._slots) + spare, self._store_options)

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
        missing = [sample for sample in dict.fromkeys(samples) if sample not in self._stored]

        def batches() -> Iterator[tuple[Sequence[int], torch.Tensor, torch.Tensor]]:
            for batch in self._batches(missing, "features"):
                yield self.slots(batch.samples), batch.images, batch.masks

        extract_into(self.store, self.backbone, batches())
        self._stored.update(missing)

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
