"""Training in anomalib: features of the images behind a train dataloader, their masks, and synthesized anomalies.

The backbone is frozen, so its features of images that are not augmented are extracted once, as in `fastbgad.fit`. They
are used for training in place of the batches' images, and for the calibration after every epoch. The images themselves
fit the backbone first if it needs that.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import Compose, Resize

from ...config import ScheduleConfig, TrainConfig
from ...data import AnomalySynthesis, AugmentedAnomalies, Sample
from ...errors import ConfigError, DataError, FeatureError, MissingDependencyError
from ...features.store import FeatureStore, StoreOptions, cell_mask
from ...model.calibration import calibration_of, stored_log_likelihoods
from ...model.detector import BGAD
from ...model.scoring import Calibration
from .data import anomalous_samples

try:
    from anomalib.data import AnomalibDataset, ImageBatch
    from anomalib.data.transforms.utils import extract_transforms_by_type
except ModuleNotFoundError as error:
    raise MissingDependencyError(error.name or "anomalib", "peers", "fastbgad.compat.anomalib") from error

_IMAGES_AT_ONCE = 32  # at calibration


class Patches(NamedTuple):
    """All patches of some images at one level."""

    features: Tensor  # [B, h * w, C]
    anomalous: Tensor  # [B, h * w] bool


class EpochShare(NamedTuple):
    """A batch's share of the work of an epoch."""

    epoch: int
    batch: int  # its number in the epoch
    batches: int

    def of(self, count: int) -> range:
        """Return this share of `count` items; the shares of all batches together are all items."""
        return range(self.batch * count // self.batches, (self.batch + 1) * count // self.batches)


class TrainingImages:
    """The images behind a train dataloader without augmentation, after the pre-processor's transform.

    Args:
        loader: Lightning's train dataloader, over a dataset of anomalib.
        transform: the pre-processor's transform of images and masks, or None.

    Attributes:
        paths: file of every image, by index.
        normals: indices of the normal images.
        anomalies: indices of the distinct anomalous images, in the order of `samples`.
        samples: the anomalous images, sorted by type and name.
        same_every_epoch: True if the loader's own batches hold the same images in every epoch.

    Raises:
        ConfigError: the dataloader is not one of anomalib's.
    """

    def __init__(self, loader: Any, transform: Any) -> None:
        dataset = getattr(loader, "dataset", None)
        if not isinstance(loader, DataLoader) or not isinstance(dataset, AnomalibDataset):
            raise ConfigError(
                f"Bgad trains on one DataLoader over a dataset of anomalib, not on {type(loader).__name__} over "
                f"{type(dataset).__name__}, because it needs the images' labels; use a datamodule of anomalib"
            )
        self._loader = loader
        self._transform = transform
        resizes = extract_transforms_by_type(transform, Resize)
        self._dataset = copy.copy(dataset)
        self._dataset.augmentations = resizes[0] if resizes else None
        self.paths: list[str] = dataset.samples.image_path.tolist()
        self.normals: list[int] = dataset.samples.index[dataset.samples.label_index == 0].tolist()
        self.samples: list[Sample] = anomalous_samples(dataset.samples)
        indices = {Path(path): index for index, path in enumerate(self.paths)}
        self.anomalies: list[int] = [indices[sample.image] for sample in self.samples]
        augmentations = dataset.augmentations
        own_collate = loader.collate_fn == dataset.collate_fn
        self.same_every_epoch: bool = (augmentations is None or isinstance(augmentations, Resize)) and own_collate

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, 3, H, W] and masks [B, H, W] bool by index, on the CPU.

        Raises:
            DataError: see `batch_masks`.
        """
        size = self._loader.batch_size or _IMAGES_AT_ONCE
        workers = min(self._loader.num_workers, len(indices) // size)
        subset: Subset[Any] = Subset(self._dataset, indices)
        for batch in DataLoader(subset, size, num_workers=workers, collate_fn=self._loader.collate_fn):
            if self._transform is not None:
                batch.image, batch.gt_mask = self._transform(batch.image, batch.gt_mask)
            yield _image(batch), batch_masks(batch, range(len(_image(batch))))


class TrainingFeatures:
    """The kept features of a training set, and the patches of every batch.

    Args:
        detector: the model in training. A backbone that needs it is fitted to the normal images first, and the model's
            image size is set to that of the images.
        images: the images behind the dataloader.
        config: method, losses, how anomalies are used.
        reuse: train on the kept features where the loader's images are the same in every epoch.
        synthesize: allow synthesis. True if the pre-processor only resizes, so that synthesized images get the same
            treatment as all others.

    Raises:
        ConfigError: anomalies are to be synthesized but the pre-processor does more than resizing.
        DataError: no normal image, no anomalous one for a method that learns from them, or one without a mask.
        FeatureError: images of different sizes, or features that are not finite.
    """

    def __init__(
        self, detector: BGAD, images: TrainingImages, config: TrainConfig, reuse: bool, synthesize: bool
    ) -> None:
        self._detector = detector
        self._config = config
        self.known: list[Sample] = images.samples if config.uses_anomalies else []
        _check(images, self.known, config)
        first, _ = next(images.batches(images.normals[:1]))
        detector.image_size = (first.shape[2], first.shape[3])
        if detector.backbone.needs_fit:
            detector.backbone.fit(part for part, _ in images.batches(images.normals))
        self._synthesis = self._plan(images, synthesize)
        self._reuse = reuse and images.same_every_epoch
        kept = images.normals + (images.anomalies if self._reuse and self.known else [])
        self._slots = {images.paths[index]: slot for slot, index in enumerate(kept)}
        self._normals = len(images.normals)
        self._store = FeatureStore(
            detector.backbone,
            detector.image_size,
            len(kept),
            StoreOptions(device=detector.device, cell_labels=config.anomalies.cell_labels),
        )
        weakref.finalize(self, self._store.close)  # training may end without a call of a hook
        self._fill(images.batches(kept))

    def close(self) -> None:
        """Free the memory, or the file, of the features."""
        self._store.close()

    def shapes(self) -> list[tuple[int, int, int]]:
        """Return (channels, height, width) of every level."""
        return self._store.shapes

    def of_batch(self, batch: ImageBatch, chosen: Sequence[int], share: EpochShare | None) -> list[Patches]:
        """Return the patches to train on for a batch, per level; an empty list if there are none.

        Args:
            batch: of the train dataloader.
            chosen: indices of the images to use. Their features are the kept ones, or extracted from the batch.
            share: which of the epoch's synthesized anomalies to add, new ones every epoch; None for none.

        Raises:
            DataError: an anomalous image without a mask, or with one that vanishes at the size of the images.
        """
        parts = []
        if len(chosen):
            paths = [batch.image_path[i] for i in chosen] if batch.image_path is not None else []
            if self._reuse and paths and all(path in self._slots for path in paths):
                parts.append(self._kept([self._slots[path] for path in paths]))
            else:
                parts.append(self._extract(_image(batch)[chosen], batch_masks(batch, chosen)))
        if share is not None and self._synthesis is not None:
            anomalies = [self._synthesis.get(share.epoch, index) for index in share.of(len(self._synthesis))]
            if anomalies:
                images, masks = (torch.stack(tensors) for tensors in zip(*anomalies, strict=True))
                parts.append(self._extract(images, masks))
        return [Patches(*map(torch.cat, zip(*of_level, strict=True))) for of_level in zip(*parts, strict=True)]

    @torch.no_grad()
    def calibration(self) -> Calibration:
        """Return the calibration of the model in its present state, from the kept features of all normal images.

        Raises:
            FeatureError: log-likelihoods that are not finite, as of a training run that diverged.
        """
        levels = stored_log_likelihoods(self._detector, self._store, range(self._normals), _IMAGES_AT_ONCE)
        if not all(bool(torch.isfinite(lp).all()) for lp in levels):
            raise FeatureError(
                "the log-likelihoods of the training images are not finite: training diverged; lower the learning rate "
                f"(lr is {self._config.schedule.lr:g})"
            )
        return calibration_of(self._detector, levels, self._config)

    def _plan(self, images: TrainingImages, synthesize: bool) -> AugmentedAnomalies | None:
        times = self._config.anomalies.cut_paste
        if not self.known or not times:
            return None
        if not synthesize:
            raise ConfigError(
                "anomalies are synthesized from files that are only resized, but this pre-processor does more to its "
                "images; use cut_paste=0, or a pre-processor with a Resize alone"
            )
        normals = [Sample(Path(images.paths[index]), None, 0, "good") for index in images.normals]
        recipe = AnomalySynthesis(repeat=0, cut_paste=times)
        return AugmentedAnomalies(self.known, normals, recipe, self._detector.image_size, self._config.seed)

    @torch.inference_mode()
    def _fill(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        done = 0
        for images, masks in batches:
            if images.shape[2:] != self._detector.image_size:
                raise FeatureError(
                    f"the training images have different sizes ({images.shape[2]} x {images.shape[3]} and "
                    f"{self._detector.image_size[0]} x {self._detector.image_size[1]}); use a pre-processor that "
                    "resizes them"
                )
            features = self._detector.backbone(images.to(self._detector.device))
            self._store.put(range(done, done + len(images)), features, masks)
            done += len(images)

    def _kept(self, slots: Sequence[int]) -> list[Patches]:
        index, device = torch.tensor(slots, device=self._store.levels[0].device), self._detector.device
        levels = zip(self._store.levels, self._store.masks, strict=True)
        return [Patches(features[index].to(device), masks[index].to(device)) for features, masks in levels]

    @torch.no_grad()
    def _extract(self, images: Tensor, masks: Tensor) -> list[Patches]:
        """Return the patches of images [B, 3, H, W] with masks [B, H, W], in the type of the kept ones."""
        features = self._detector.backbone(images.to(self._detector.device))
        labels = self._config.anomalies.cell_labels
        return [
            Patches(
                maps.permute(0, 2, 3, 1).flatten(1, 2).to(self._store.dtype),
                cell_mask(masks, (maps.shape[2], maps.shape[3]), labels).flatten(1).to(maps.device),
            )
            for maps in features
        ]


def batch_masks(batch: ImageBatch, chosen: Sequence[int]) -> Tensor:
    """Return the masks of some of a batch's images as bool [B, H, W]; all False for normal images without masks.

    Raises:
        DataError: an anomalous image has no mask.
    """
    if batch.gt_mask is not None:
        return batch.gt_mask.as_subclass(Tensor).bool()[chosen]
    images, labels = _image(batch), batch_labels(batch)
    for index in chosen:
        if labels[index]:
            raise _no_mask(batch.image_path[index] if batch.image_path is not None else f"image {index} of a batch")
    return torch.zeros(len(chosen), *images.shape[2:], dtype=torch.bool, device=images.device)


def batch_labels(batch: ImageBatch) -> Tensor:
    """Return the labels of a batch, True for anomalous images, bool [B] on the CPU; unlabeled ones count as normal."""
    if batch.gt_label is None:
        return torch.zeros(len(_image(batch)), dtype=torch.bool)
    return batch.gt_label.as_subclass(Tensor).bool().cpu()


def only_resizes(transform: Any) -> bool:
    """Return True if a pre-processor's transform does nothing to images but resize them."""
    if isinstance(transform, Compose):
        return all(only_resizes(part) for part in transform.transforms)
    return transform is None or isinstance(transform, Resize)


def _image(batch: ImageBatch) -> Tensor:
    """Return the images of a batch, [B, 3, H, W], as an ordinary tensor."""
    return cast(Tensor, batch.image).as_subclass(Tensor)


def _check(images: TrainingImages, known: list[Sample], config: TrainConfig) -> None:
    if not images.normals:
        raise DataError("the training set of the datamodule holds no normal image")
    if config.uses_anomalies and not known:
        raise DataError(
            f"method {config.method!r} learns from anomalies, but the training set holds normal images only, as it "
            "does in anomalib's datamodules: use fastbgad.compat.anomalib.with_known_anomalies(datamodule, "
            "num_anomalies=10), or method='nfad' or 'bgad_without'"
        )
    for sample in known:
        if sample.mask is None:
            raise _no_mask(sample.image)


def _no_mask(image: object) -> DataError:
    return DataError(
        f"the anomalous training image {image} has no mask, but methods bgad and bgad_dagger learn from anomalous "
        "pixels; give the datamodule its masks (mask_dir of a Folder), or use method='nfad' or 'bgad_without'"
    )


def check_trainer(trainer: Any, config: TrainConfig) -> None:
    """Raise `ConfigError` for a trainer that Bgad cannot be trained with in this configuration."""
    if trainer.world_size > 1:
        raise ConfigError(f"Bgad trains on one device, not on {trainer.world_size}; use devices=1")
    if str(trainer.precision).endswith("-true") and str(trainer.precision) != "32-true":
        raise ConfigError(
            f"precision is {trainer.precision!r}, but flows are trained in float32; leave precision out, and use "
            "backbone_dtype for a faster backbone"
        )
    if trainer.max_epochs is None or trainer.max_epochs < 1:
        raise ConfigError(f"max_epochs is {trainer.max_epochs}; the schedule needs a number (officially 200)")
    if config.method != "nfad" and trainer.max_epochs < 2:
        raise ConfigError(
            f"max_epochs is {trainer.max_epochs}, but the first epoch trains on normal images by likelihood alone and "
            f"method {config.method!r} begins after it; use 2 at least (officially 200)"
        )


def divided(schedule: ScheduleConfig, max_epochs: int) -> ScheduleConfig:
    """Return the schedule of a run of so many passes, with its meta epochs or as near as whole passes allow."""
    sub_epochs = max(1, round(max_epochs / schedule.meta_epochs))
    meta_epochs = math.ceil(max_epochs / sub_epochs)
    warmup = min(schedule.warmup_epochs, meta_epochs // 2)
    return replace(schedule, meta_epochs=meta_epochs, sub_epochs=sub_epochs, warmup_epochs=warmup)
