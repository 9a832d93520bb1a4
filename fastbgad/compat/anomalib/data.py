"""Known anomalies for anomalib's datamodules, which put every abnormal image into the test set.

    datamodule = with_known_anomalies(MVTecAD(root="mvtec", category="screw"), num_anomalies=10)

anomalib 2.7 cannot train on labeled anomalies by itself: its datamodules offer none, not even to SuperSimpleNet, its
one model with a supervised mode. `KnownAnomalies` wraps a datamodule and moves a few anomalies to the training set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...data import Category, Sample, split_known_anomalies
from ...errors import ConfigError, DataError, MissingDependencyError

try:
    from anomalib.data import AnomalibDataModule, AnomalibDataset
except ModuleNotFoundError as error:
    raise MissingDependencyError(error.name or "anomalib", "peers", "fastbgad.compat.anomalib") from error

# A datamodule that overrides one of these divides its images in a way that this module does not know.
_RULES = ("setup", "_create_test_split", "_create_val_split", "train_dataloader")


class KnownAnomalies(AnomalibDataModule):
    """A datamodule that moves some anomalous images of another one from the test set to the training set.

    They leave the test set before it is divided, so that no part of it, validation included, holds a training image,
    and they join the training set after it was divided, so that validation images taken from there are normal. The
    draw is that of `fastbgad.split_known_anomalies`: it depends on the seed and the file names alone, is the same at
    every `setup`, and the same as fastbgad's own for a folder in the layout of MVTec AD. An anomaly's type is the name
    of its image's folder.

    For the command line of anomalib, where datamodules nest:

        --data fastbgad.compat.anomalib.KnownAnomalies --data.data Folder --data.data.name parts ...

    Args:
        data: an image datamodule that divides its images by anomalib's usual rules: Folder, MVTecAD, BTech, VisA and
            others. Its batch sizes, augmentations and split modes apply.
        num_anomalies: number of anomalous images to move; 0 moves none. None: 10, or half of those there are where that
            is fewer (with `per_type` of each type).
        per_type: move this many of each type instead of in total.
        seed: of the draw.
        repeat: how often an epoch sees each known anomaly (the paper's repeated utilization).

    Attributes:
        known: dataset of the images that were moved; set by `setup`.

    Raises:
        ConfigError: an impossible number, or a datamodule with splitting rules of its own.

    `setup` raises `DataError` if there are fewer than `num_anomalies`, or if none would be left for the test (without a
    number: if there is only one).

    Source: Yao et al., CVPR 2023 (known anomalies are taken from the test set).
    """

    known: AnomalibDataset
    train_data: AnomalibDataset
    val_data: AnomalibDataset
    test_data: AnomalibDataset

    def __init__(
        self,
        data: AnomalibDataModule,
        num_anomalies: int | None = None,
        per_type: bool = False,
        seed: int = 0,
        repeat: int = 5,
    ) -> None:
        if (num_anomalies or 0) < 0 or seed < 0 or repeat < 1:
            raise ConfigError(
                f"num_anomalies is {num_anomalies}, seed {seed} and repeat {repeat}; give at least 0, 0 and 1"
            )
        overridden = [name for name in _RULES if getattr(type(data), name) is not getattr(AnomalibDataModule, name)]
        if overridden:
            raise ConfigError(
                f"known anomalies cannot be taken out of a {type(data).__name__}: it has its own "
                f"{', '.join(overridden)}; use Folder, MVTecAD or another datamodule that divides its images by "
                "anomalib's rules"
            )
        super().__init__(
            train_batch_size=data.train_batch_size,
            eval_batch_size=data.eval_batch_size,
            num_workers=data.num_workers,
            train_augmentations=data.train_augmentations,
            val_augmentations=data.val_augmentations,
            test_augmentations=data.test_augmentations,
            val_split_mode=data.val_split_mode,
            val_split_ratio=data.val_split_ratio,
            test_split_mode=data.test_split_mode,
            test_split_ratio=data.test_split_ratio,
            seed=data.seed,
        )
        self.data: AnomalibDataModule = data
        self.external_collate_fn: Callable[..., Any] | None = data.external_collate_fn
        self.num_anomalies: int | None = num_anomalies
        self.per_type: bool = per_type
        self.draw_seed: int = seed
        self.repeat: int = repeat

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the wrapped datamodule."""
        return self.data.name

    @property
    def category(self) -> str:
        """Category of the wrapped datamodule."""
        return self.data.category

    @category.setter
    def category(self, category: str) -> None:
        self.data.category = category

    def prepare_data(self) -> None:
        """Download what the wrapped datamodule downloads."""
        self.data.prepare_data()

    def _setup(self, _stage: str | None = None) -> None:
        """Take the wrapped datamodule's images, and the known anomalies out of the test set."""
        self.data._setup(_stage)
        self.train_data, test_data = self.data.train_data, self.data.test_data
        if hasattr(self.data, "val_data"):
            self.val_data: AnomalibDataset = self.data.val_data
        moved = self._draw(test_data)
        self.known = test_data.subsample(moved)
        self.test_data: AnomalibDataset = test_data.subsample(sorted(set(range(len(test_data))) - set(moved)))

    def _create_val_split(self) -> None:
        super()._create_val_split()
        for _ in range(self.repeat if len(self.known) else 0):
            self.train_data: AnomalibDataset = self.train_data + self.known

    def _draw(self, dataset: AnomalibDataset) -> list[int]:
        """Return the indices of the images to move, in increasing order."""
        if self.num_anomalies == 0:
            return []
        samples = anomalous_samples(dataset.samples)
        if not samples:
            raise DataError(
                f"the test set of {self.name} holds no anomalous image to learn from; name their folder "
                "(abnormal_dir of a Folder), or use num_anomalies=0 with a method that needs none"
            )
        root = Path(os.path.commonpath([sample.image.parent for sample in samples]))
        category = Category(self.name, root, "anomalib", (), tuple(samples))
        split = split_known_anomalies(category, self.num_anomalies, self.per_type, self.draw_seed)
        moved = {sample.image for sample in split.known_anomalies}
        return [index for index, path in enumerate(dataset.samples.image_path) if Path(path) in moved]


def with_known_anomalies(
    datamodule: AnomalibDataModule,
    num_anomalies: int | None = None,
    *,
    per_type: bool = False,
    seed: int = 0,
    repeat: int = 5,
) -> KnownAnomalies:
    """Return a datamodule that moves some anomalous images of another one from the test set to the training set.

    See `KnownAnomalies` for the arguments and errors.
    """
    return KnownAnomalies(datamodule, num_anomalies, per_type, seed, repeat)


def anomalous_samples(table: Any) -> list[Sample]:
    """Return the distinct anomalous images in a dataset's table (`samples`), sorted by type and file name."""
    chosen = table[table.label_index == 1].drop_duplicates("image_path")
    samples = []
    for image, mask in zip(chosen.image_path, chosen.mask_path, strict=True):
        path = Path(image)
        has_mask = isinstance(mask, str | Path) and str(mask) != ""
        samples.append(Sample(path, Path(mask) if has_mask else None, 1, path.parent.name))
    return sorted(samples, key=lambda sample: (sample.defect, sample.image.name))
