"""The runner of cells of one category: split, train, measure after every meta epoch.

Features are extracted once for all cells of a category, and a training serves all cells that share it. The features of
test images are stored as well, so that measuring after a meta epoch only takes a pass of the flows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...backbones import Backbone, Standardize, create_backbone
from ...config import TrainConfig
from ...data import Category, DecodedImages, Sample, Split
from ...errors import BackboneError, MetricError
from ...evaluate.metrics import evaluate
from ...features import ImageFeatures, ImageReading, StoreOptions
from ...model.calibration import calibration_of, stored_log_likelihoods
from ...model.detector import BGAD
from ...model.scoring import official_anomaly_maps
from ...ops import score_map
from ...progress import Progress
from ...system.environment import machine, versions
from ...system.files import write_with
from ...train.fit import fit, spare_slots
from ..peers import run_peer
from ..plan import METRICS, Cell, CellResult, Dataset, Setup, split_of

_PICTURED_METHODS = ("nfad", "bgad")
_PICTURES = 3  # test images whose maps are kept, of different defect types
_IMAGES_AT_ONCE = 32


class _TestImages(NamedTuple):
    """Test images of a cell."""

    split: Split  # its test is restricted to the cell's test types
    masks: Tensor  # bool [n, H, W]
    labels: np.ndarray  # bool [n]
    indices: Tensor  # int64 [n], among all test images of the cells that are run together


class CellRunner:
    """Runner of the cells of one category.

    Args:
        setup: options that all cells have in common.
        category: an opened category.
        dataset: the data set it belongs to.
        device: where to train.
        workers: threads that decode images and synthesize anomalies.
        pictures: folder for the maps of a few test images of NFAD and BGAD; None keeps none.
        on_progress: told how a training goes.
    """

    def __init__(
        self,
        setup: Setup,
        category: Category,
        dataset: Dataset,
        *,
        device: torch.device,
        workers: int = 2,
        pictures: Path | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.setup: Setup = setup
        self.category: Category = category
        self.dataset = dataset
        self.device: torch.device = device
        self.workers: int = workers
        self.pictures: Path | None = pictures
        self.on_progress: Callable[[Progress], None] | None = on_progress
        self._features: ImageFeatures | None = None

    def run(self, cells: Sequence[Cell]) -> list[CellResult]:
        """Return the results of cells that share a training, in their order.

        Raises:
            DataError: an unknown defect type, fewer anomalies than asked for, or an image that cannot be used.
            MetricError: a metric has no value, as without masks.
            ConfigError, BackboneError, FeatureError: see `fastbgad.fit` and `run_peer`.
        """
        keys = {(cell.dataset, cell.category, cell.training_key) for cell in cells}
        if len(keys) != 1 or cells[0].category != self.category.name or cells[0].dataset != self.dataset:
            raise ValueError(f"these cells do not share a training on {self.dataset} {self.category.name}: {cells}")
        splits = [split_of(cell, self.category) for cell in cells]
        return self._run_peer(cells, splits) if cells[0].is_peer else self._train(cells, splits)

    def close(self) -> None:
        """Free the features."""
        if self._features is not None:
            self._features.close()

    def _train(self, cells: Sequence[Cell], splits: Sequence[Split]) -> list[CellResult]:
        started = time.perf_counter()
        config, split = self.setup.training_of(cells[0]), splits[0]
        if not config.uses_anomalies:
            split = Split(split.normals, (), split.test)
        features = self._features_for(config, len(split.known_anomalies))
        images = list(dict.fromkeys(sample for each in splits for sample in each.test))
        features.extract([*split.normals, *images])
        tests = [self._test(each, images, features.decoded) for each in splits]
        model = BGAD(
            features.backbone,
            self.setup.image_size,
            flow=config.flow,
            normalizer=config.loss.normalizer,
            seed=config.seed,
            matmul_precision=self.setup.matmul_precision,
        ).to(self.device)
        epochs: list[list[dict[str, float]]] = [[] for _ in cells]
        maps: list[Tensor] = []

        def measure(meta_epoch: int) -> None:
            levels = stored_log_likelihoods(model, features.store, features.slots(images), _IMAGES_AT_ONCE)
            to_maps = self._scoring(model, features, split.normals, config)
            maps.clear()
            for test, history in zip(tests, epochs, strict=True):
                maps.append(to_maps([lp[test.indices.to(lp.device)] for lp in levels]).cpu())
                history.append(self._metrics(maps[-1], maps[-1].amax(dim=(1, 2)), test))

        result = fit(
            model,
            split,
            config,
            features=features,
            workers=self.workers,
            on_progress=self.on_progress,
            on_meta_epoch=measure,
        )
        facts = {
            "parameters": sum(p.numel() for p in model.flows.parameters() if p.requires_grad),
            "training_images": len(split.normals),
            "training_seconds": result.seconds,
            "last_pass": result.history[-1],
        }
        seconds = time.perf_counter() - started
        results = []
        for cell, cell_split, test, history, cell_maps in zip(cells, splits, tests, epochs, maps, strict=True):
            best = {name: max(metrics[name] for metrics in history) for name in METRICS}
            results.append(self._result(cell, cell_split, history[-1], best, history, seconds, facts))
            self._keep_pictures(cell, test, cell_maps)
        return results

    def _scoring(
        self, model: BGAD, features: ImageFeatures, normals: Sequence[Sample], config: TrainConfig
    ) -> Callable[[Sequence[Tensor]], Tensor]:
        """Return the function from log-likelihood maps to anomaly maps, with the flows as they are now."""
        size = self.setup.image_size
        if self.setup.calibration == "official":
            return lambda levels: official_anomaly_maps(levels, size)
        levels = stored_log_likelihoods(model, features.store, features.slots(normals), _IMAGES_AT_ONCE)
        constants = calibration_of(model, levels, config)
        return lambda levels: score_map(levels, size, constants.level_max, constants.offset).anomaly_map

    def _features_for(self, config: TrainConfig, known: int) -> ImageFeatures:
        """Return the features of all images of the category, with spare slots for what a training synthesizes."""
        spare = spare_slots(config, known)
        if self._features is None:
            backbone = self._backbone()
            self._features = ImageFeatures(
                backbone,
                self.setup.image_size,
                [*self.category.train, *self.category.test, *self.category.known],
                self.category.train,
                spare,
                store=StoreOptions(device=self.device, cell_labels=config.anomalies.cell_labels),
                reading=ImageReading(workers=self.workers, on_images=self._show_images),
            )
        self._features.reserve(spare)
        return self._features

    def _backbone(self) -> Backbone:
        setup = self.setup
        if setup.backbone == "gabor":  # its statistics are those of the category
            return create_backbone("gabor", setup.levels).to(self.device)
        choices = (setup.backbone, setup.levels, setup.weights, setup.dtype, setup.standardize, setup.neighborhood)
        return _timm_backbone(*choices, self.device).without_statistics()

    def _run_peer(self, cells: Sequence[Cell], splits: Sequence[Split]) -> list[CellResult]:
        """Train a peer once and score all test images of the cells."""
        started = time.perf_counter()
        images = list(dict.fromkeys(sample for split in splits for sample in split.test))
        known = splits[0].known_anomalies if cells[0].learns_from_anomalies else ()
        union = Split(splits[0].normals, known, tuple(images))
        scores = run_peer(cells[0], self.category, union, self.setup, self.device, workers=self.workers)
        decoded = DecodedImages(self.setup.image_size) if self._features is None else self._features.decoded
        tests = [self._test(split, images, decoded) for split in splits]
        metrics = [self._metrics(scores.maps[t.indices], scores.image_scores[t.indices], t) for t in tests]
        seconds = time.perf_counter() - started
        return [
            self._result(cell, split, last, None, [], seconds, scores.facts)
            for cell, split, last in zip(cells, splits, metrics, strict=True)
        ]

    def _test(self, split: Split, images: Sequence[Sample], decoded: DecodedImages) -> _TestImages:
        index = {sample: number for number, sample in enumerate(images)}
        masks = torch.stack([decoded(sample).mask for sample in split.test])
        labels = np.array([sample.label for sample in split.test], dtype=bool)
        return _TestImages(split, masks, labels, torch.tensor([index[sample] for sample in split.test]))

    def _metrics(self, maps: Tensor, image_scores: Tensor, test: _TestImages) -> dict[str, float]:
        try:
            metrics = evaluate(maps, test.masks, image_scores, test.labels, self.setup.pro_limit)._asdict()
        except MetricError as error:  # every mask vanishes at the image size, for example
            raise MetricError(f"{self.category.root} at {self.setup.image_size}: {error}") from error
        return {name: float(metrics[name]) for name in METRICS}

    def _result(
        self,
        cell: Cell,
        split: Split,
        last: dict[str, float],
        best: dict[str, float] | None,
        epochs: list[dict[str, float]],
        seconds: float,
        facts: dict[str, Any],
    ) -> CellResult:
        return CellResult(
            cell,
            last,
            best,
            epochs,
            seconds,
            [sample.name for sample in split.known_anomalies],
            len(split.test),
            sum(sample.label for sample in split.test),
            {**facts, "machine": machine(), "versions": versions()},
        )

    def _keep_pictures(self, cell: Cell, test: _TestImages, maps: Tensor) -> None:
        """Write image, mask and map of the first test image of a few defect types."""
        is_plain = cell.known_types is None and cell.test_types is None and not cell.overrides
        if self.pictures is None or self._features is None or cell.method not in _PICTURED_METHODS or not is_plain:
            return
        first: dict[str, int] = {}
        for index, sample in enumerate(test.split.test):
            if sample.label:
                first.setdefault(sample.defect, index)
        chosen = list(first.values())[:_PICTURES]
        samples = [test.split.test[index] for index in chosen]
        arrays: dict[str, Any] = {
            "names": np.array([sample.name for sample in samples]),
            "images": np.stack([self._features.decoded(s).image.permute(1, 2, 0).numpy() for s in samples]),
            "masks": test.masks[chosen].numpy(),
            "maps": maps[chosen].to(torch.float16).numpy(),
            # from the median score to the largest, as in the report
            "range": np.array([maps.flatten()[:: max(1, maps.numel() // 1_000_000)].median(), maps.max()], np.float32),
        }
        write_with(self.pictures / f"{cell.key}.npz", partial(np.savez_compressed, **arrays))

    def _show_images(self, stage: str, done: int, total: int, images_per_second: float) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(stage, done, total, images_per_second, {}))


@lru_cache(maxsize=1)
def _timm_backbone(
    name: str,
    levels: tuple[int, ...],
    weights: str,
    dtype: str,
    standardize: Standardize,
    neighborhood: int | None,
    device: torch.device,
) -> Backbone:
    """Load a frozen network; the last one is kept, because it is the same for every category."""
    backbone = create_backbone(name, levels, weights, dtype=dtype, standardize=standardize, neighborhood=neighborhood)
    source = getattr(backbone, "weights_source", weights)
    if source != weights:
        raise BackboneError(
            f"this run has {weights} weights of {name}, but the hub no longer answers; other weights cannot share its "
            f"tables: repeat the command later, or give --weights {source} and another --out"
        )
    return backbone.to(device)
