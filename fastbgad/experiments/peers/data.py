"""A split as a data module of anomalib's Engine: no labels and masks, except for known anomalies in training.

Images are decoded and resized as for fastbgad's own methods, and normalized here. anomalib would normalize them later,
but its CFA computes the centers of its hyperspheres from the batches of the dataloader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from ...data import Sample, Split, stream_batches
from ...errors import MissingDependencyError

try:
    from anomalib.data import ImageBatch
    from lightning.pytorch import LightningDataModule
except ModuleNotFoundError as error:
    package: str = (error.name or "anomalib").partition(".")[0]
    raise MissingDependencyError(package, "peers", "a method of another author") from error

Statistics: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of red, green and blue that a backbone expects images to be normalized with."""
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""anomalib's default for every model."""


class SplitData(LightningDataModule):
    """Training and prediction batches of a split.

    Args:
        split: its normals are trained on, its test images are predicted, in their order.
        supervised: also train on the split's known anomalies. Batches then have labels and masks, and an epoch draws
            known anomalies as often as it has normals, each equally often up to one time.
        size: height and width in pixels.
        batch_size: images in a batch.
        statistics: mean and deviation that images are normalized with; None: images in [0, 1].
        whole_batches: leave an incomplete last batch of an epoch out, where there is a complete one.
        workers: threads that decode images.
    """

    name: str = "split"
    category = ""  # anomalib's Engine names its folder after both

    def __init__(
        self,
        split: Split,
        size: tuple[int, int],
        batch_size: int,
        *,
        statistics: Statistics | None,
        supervised: bool = False,
        whole_batches: bool = False,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self._normals, self._test = _images_alone(split.normals), _images_alone(split.test)
        self._known = list(split.known_anomalies) if supervised else []
        self._size, self._batch_size, self._workers = size, batch_size, workers
        self._statistics, self._whole_batches = statistics, whole_batches
        self._kept: TensorDataset | None = None

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return batches in random order, a new one in every epoch. Images are decoded once and stored as bytes."""
        if self._kept is None:
            samples = [*self._normals, *self._known]
            batches = list(stream_batches(samples, self._size, self._batch_size, self._workers))
            tensors = [torch.cat([batch.images for batch in batches])]
            if self._known:
                tensors += [torch.tensor([s.label for s in samples]), torch.cat([batch.masks for batch in batches])]
            self._kept = TensorDataset(*tensors)
        normals, known = len(self._normals), len(self._known)
        drawn = [*range(normals), *(normals + draw % known for draw in range(normals if known else 0))]
        drop = self._whole_batches and len(drawn) >= self._batch_size
        return DataLoader(
            Subset(self._kept, drawn), self._batch_size, shuffle=True, drop_last=drop, collate_fn=self._collate
        )

    def predict_dataloader(self) -> PredictBatches:
        """Return the test images, in their order."""
        return PredictBatches(self)

    def _collate(self, items: Sequence[tuple[Tensor, ...]]) -> ImageBatch:
        return self._batch(*(torch.stack(column) for column in zip(*items, strict=True)))

    def _batch(self, pixels: Tensor, labels: Tensor | None = None, masks: Tensor | None = None) -> ImageBatch:
        """Return pixels uint8 [B, 3, H, W], with labels [B] and masks [B, H, W] if given, as anomalib's batch."""
        images = pixels.float() / 255
        if self._statistics is not None:
            mean, std = (images.new_tensor(values).view(3, 1, 1) for values in self._statistics)
            images = (images - mean) / std
        return ImageBatch(image=images, gt_label=labels, gt_mask=masks)


class PredictBatches:
    """Dataloader of the test images for Lightning; threads decode them ahead."""

    def __init__(self, data: SplitData) -> None:
        self._data = data

    def __len__(self) -> int:
        return -(-len(self._data._test) // self._data._batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        data = self._data
        for batch in stream_batches(data._test, data._size, data._batch_size, data._workers):
            yield data._batch(batch.images)


def _images_alone(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples as if all were normal, so that no label and no mask is ever read."""
    return [Sample(sample.image, None, 0, sample.defect) for sample in samples]
