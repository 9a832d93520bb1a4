"""A split as anomalib's Engine takes it: the images alone, without labels, masks or known anomalies.

Images are decoded and resized as for fastbgad's own methods, and normalised here. anomalib would normalise them later,
but its CFA computes the centres of its hyperspheres from what the dataloader gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ..data import Sample, Split, stream_batches
from ..errors import MissingDependencyError

try:
    from anomalib.data import ImageBatch
    from lightning.pytorch import LightningDataModule
except ModuleNotFoundError as error:
    package = (error.name or "anomalib").partition(".")[0]
    raise MissingDependencyError(package, "peers", "a method of another author") from error

# ImageNet's, as all of anomalib's models have them.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class SplitData(LightningDataModule):
    """Training and prediction batches of a split.

    Args:
        split: its normals are trained on, its test images are predicted, in their order.
        size: height and width in pixels.
        batch_size: images in a batch.
        normalise: subtract ImageNet's mean and divide by its deviation, instead of images in [0, 1].
        whole_batches: leave an incomplete last batch of an epoch out, where there is a complete one.
        workers: threads that decode images.
    """

    name = "split"
    category = ""  # anomalib's Engine asks both for the name of its folder

    def __init__(
        self,
        split: Split,
        size: tuple[int, int],
        batch_size: int,
        *,
        normalise: bool,
        whole_batches: bool = False,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self._normals, self._test = _images_alone(split.normals), _images_alone(split.test)
        self._size, self._batch_size, self._workers = size, batch_size, workers
        self._normalise, self._whole_batches = normalise, whole_batches
        self._kept: Tensor | None = None

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches in random order, another one in every epoch. Images are decoded once and kept as bytes."""
        if self._kept is None:
            batches = stream_batches(self._normals, self._size, self._batch_size, self._workers)
            self._kept = torch.cat([batch.images for batch in batches])
        drop = self._whole_batches and len(self._kept) >= self._batch_size
        return DataLoader(
            TensorDataset(self._kept), self._batch_size, shuffle=True, drop_last=drop, collate_fn=self._collate
        )

    def predict_dataloader(self) -> PredictBatches:
        """The test images, in their order."""
        return PredictBatches(self)

    def _collate(self, items: Sequence[tuple[Tensor, ...]]) -> ImageBatch:
        return self._batch(torch.stack([image for (image,) in items]))

    def _batch(self, pixels: Tensor) -> ImageBatch:
        """Pixels uint8 [B, 3, H, W] as anomalib's batch."""
        images = pixels.float() / 255
        if self._normalise:
            images = (images - images.new_tensor(_MEAN).view(3, 1, 1)) / images.new_tensor(_STD).view(3, 1, 1)
        return ImageBatch(image=images)


class PredictBatches:
    """What Lightning takes for a dataloader: batches of the test images, decoded ahead by threads."""

    def __init__(self, data: SplitData) -> None:
        self._data = data

    def __len__(self) -> int:
        return -(-len(self._data._test) // self._data._batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        data = self._data
        for batch in stream_batches(data._test, data._size, data._batch_size, data._workers):
            yield data._batch(batch.images)


def _images_alone(samples: Sequence[Sample]) -> list[Sample]:
    """The samples as if all were normal, so that no label and no mask is ever read."""
    return [Sample(sample.image, None, 0, sample.defect) for sample in samples]
