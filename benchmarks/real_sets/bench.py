"""Measures one contender after the other on a category; the backbone sees every image once for all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbgad.backbones import Backbone
from fastbgad.backbones.timm_features import TimmBackbone, whole_state
from fastbgad.config import CellLabels, TrainConfig, demo_preset
from fastbgad.data import Category, DecodedImages, Split
from fastbgad.errors import ConfigError
from fastbgad.evaluate.metrics import evaluate
from fastbgad.experiments.peers.peers import run_peer
from fastbgad.experiments.plan.cells import Cell
from fastbgad.experiments.plan.setup import Setup
from fastbgad.features import ImageFeatures, ImageReading, StoreOptions
from fastbgad.model import BGAD
from fastbgad.model.calibration import calibration_of, stored_log_likelihoods
from fastbgad.ops import score_map
from fastbgad.train.fit import fit, spare_slots

from .gaussian import RIDGE, gaussian_maps
from .grid import CONVERGENCE, GAUSSIAN, LEARN_FROM_ANOMALIES, OURS, TRAINED_PEERS, Run
from .recall import recall_at_false_alarms
from .sets import split_set

_IMAGES_AT_ONCE = 16
_CPU = torch.device("cpu")


class Scores(NamedTuple):
    """A contender's maps and scores of n test images."""

    maps: Tensor  # [n, H, W] float32
    image_scores: Tensor  # [n] float32
    sides: Tensor | None  # [n] uint8: 0 normal, 1 beyond b_n, 2 beyond b_a; None for a method without boundaries
    training_seconds: float
    scoring_seconds: float
    facts: dict[str, Any]
    points: list[dict[str, float]]  # of a convergence run: the metrics after every meta epoch


class Bench:
    """The images of a category with the features that contenders share.

    Args:
        category: an opened category.
        backbone: of fastbgad's methods and the Gaussian; peers get its weights.
        size: height and width of the images.
        workers: threads that decode images.
        presets: configuration of every schedule, by its name.
        convergence_passes: passes over the training images of a convergence run.
    """

    def __init__(
        self,
        category: Category,
        backbone: Backbone,
        size: int,
        *,
        workers: int = 1,
        presets: dict[str, TrainConfig],
        convergence_passes: int = 16,
    ) -> None:
        self.category, self.backbone, self.size = category, backbone, (size, size)
        self.workers, self.presets, self.convergence_passes = workers, presets, convergence_passes
        self._decoded = DecodedImages(self.size)
        self._features: ImageFeatures | None = None
        self._fit_seconds, self._image_seconds = 0.0, 0.0

    def close(self) -> None:
        """Free the features."""
        if self._features is not None:
            self._features.close()
            self._features = None

    def run(self, run: Run) -> tuple[Split, Scores]:
        """Return the run's split and what its contender says of the test images; raises `FastBGADError`."""
        split = split_set(self.category, run.seed)
        if run.method in OURS:
            return split, self._own(run, split)
        if run.method == GAUSSIAN:
            return split, self._gaussian(split)
        return split, self._peer(run, split)

    def metrics(self, split: Split, scores: Scores) -> dict[str, float]:
        """Return the metrics of a run, each in [0, 1]."""
        return {
            **self._areas(split, scores.maps, scores.image_scores),
            "recall_at_1_percent": recall_at_false_alarms(scores.image_scores.numpy(), labels_of(split)),
        }

    def images_and_masks(self, split: Split, places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return test images uint8 [n, H, W, 3] and their masks bool [n, H, W]."""
        loaded = [self._decoded(split.test[place]) for place in places]
        images = np.stack([each.image.permute(1, 2, 0).numpy() for each in loaded])
        return images, np.stack([each.mask.numpy() for each in loaded])

    def _own(self, run: Run, split: Split) -> Scores:
        config = self._config(run)
        if not config.uses_anomalies:
            split = Split(split.normals, (), split.test)
        features = self._shared(config.anomalies.cell_labels)
        features.reserve(spare_slots(config, len(split.known_anomalies)))
        model = BGAD(self.backbone, self.size, flow=config.flow, normalizer=config.loss.normalizer, seed=run.seed)
        points: list[dict[str, float]] = []
        started, measuring = time.perf_counter(), 0.0

        def measure(meta_epoch: int) -> None:
            nonlocal measuring
            clock = time.perf_counter()
            passes = (meta_epoch + 1) * config.schedule.sub_epochs
            seconds = self._extraction(split) + clock - started - measuring
            point = self._point(model, features, split, config)
            points.append({"passes": passes, "seconds": round(seconds, 2), **point})
            measuring += time.perf_counter() - clock

        measures = measure if run.setting == CONVERGENCE else None
        result = fit(model, split, config, features=features, workers=self.workers, on_meta_epoch=measures)
        clock = time.perf_counter()
        levels = stored_log_likelihoods(model, features.store, features.slots(split.test), _IMAGES_AT_ONCE)
        parts = zip(*(lp.split(_IMAGES_AT_ONCE) for lp in levels), strict=True)
        predictions = [model.decide(part) for part in parts]
        seconds = time.perf_counter() - clock
        facts = {
            "passes": config.schedule.meta_epochs * config.schedule.sub_epochs,
            "parameters": sum(p.numel() for p in model.flows.parameters() if p.requires_grad),
        }
        return Scores(
            torch.cat([each.anomaly_map for each in predictions]),
            torch.cat([each.image_score for each in predictions]),
            torch.cat([each.image_side for each in predictions]),
            self._extraction(split) + result.seconds - measuring,
            seconds + self._image_seconds * len(split.test),
            facts,
            points,
        )

    def _gaussian(self, split: Split) -> Scores:
        features = self._shared(None)
        clock = time.perf_counter()
        maps, image_scores = gaussian_maps(
            features.store, features.slots(split.normals), features.slots(split.test), self.size
        )
        seconds = time.perf_counter() - clock
        # Fitting and scoring take the same arithmetic per image.
        share = len(split.normals) / (len(split.normals) + len(split.test))
        training = self._extraction(Split(split.normals, (), ())) + share * seconds
        scoring = self._image_seconds * len(split.test) + (1 - share) * seconds
        return Scores(maps, image_scores, None, training, scoring, {"ridge": RIDGE}, [])

    def _peer(self, run: Run, split: Split) -> Scores:
        if not isinstance(self.backbone, TimmBackbone):
            raise ConfigError(f"{run.method} takes features of timm's backbones only, not {run.features}")
        overrides: dict[str, Any] = {"peer.backbone": self.backbone.name}
        if run.method in TRAINED_PEERS:
            overrides["peer.epochs"] = int(run.setting.removesuffix("-epochs"))
        if run.method == "supersimplenet":
            # As many images as BGAD's demo preset takes; with the authors' 32 few epochs would be few steps.
            overrides["peer.batch_size"] = 8
        # The name of the data set only tells cells of different sets apart, which is no concern here.
        cell = Cell("mvtec", self.category.name, run.method, run.seed, overrides=tuple(sorted(overrides.items())))
        setup = Setup(image_size=self.size, weights="random")
        state = whole_state(self.backbone)
        found = run_peer(cell, self.category, split, setup, _CPU, workers=self.workers, state=state)
        facts = dict(found.facts)
        seconds = facts.pop("training_seconds"), facts.pop("scoring_seconds")
        return Scores(found.maps, found.image_scores, None, *seconds, facts, [])

    def _shared(self, cell_labels: CellLabels | None) -> ImageFeatures:
        """Return the features of all images; None takes whichever labels of patches are there."""
        if self._features is not None and cell_labels in (None, self._features.store.cell_labels):
            return self._features
        self.close()
        images = [*self.category.train, *self.category.test]
        needs_fit, clock = self.backbone.needs_fit, time.perf_counter()
        self._features = ImageFeatures(
            self.backbone,
            self.size,
            images,
            self.category.train,
            store=StoreOptions(cell_labels=cell_labels or "any"),
            reading=ImageReading(_IMAGES_AT_ONCE, self.workers, self._decoded),
        )
        fitted = time.perf_counter()
        self._features.extract(images)
        if needs_fit:  # it is fitted once, and its seconds belong to every training
            self._fit_seconds = fitted - clock
        self._image_seconds = (time.perf_counter() - fitted) / len(images)
        return self._features

    def _extraction(self, split: Split) -> float:
        """Return the seconds that decoding and the backbone take for the training images of a split, as if alone."""
        return self._fit_seconds + self._image_seconds * (len(split.normals) + len(split.known_anomalies))

    def _config(self, run: Run) -> TrainConfig:
        if run.setting == CONVERGENCE:
            config = demo_preset("bgad", run.seed)
            meta_epochs = max(1, self.convergence_passes // config.schedule.sub_epochs)
            return replace(config, schedule=replace(config.schedule, meta_epochs=meta_epochs))
        return replace(self.presets[run.setting], method=run.method, seed=run.seed)  # type: ignore[arg-type]

    def _point(self, model: BGAD, features: ImageFeatures, split: Split, config: TrainConfig) -> dict[str, float]:
        """Return the metrics of a model in training, calibrated as at its end."""
        store = features.store
        normal = stored_log_likelihoods(model, store, features.slots(split.normals), _IMAGES_AT_ONCE)
        constants = calibration_of(model, normal, config)
        levels = stored_log_likelihoods(model, store, features.slots(split.test), _IMAGES_AT_ONCE)
        scores = score_map(levels, self.size, constants.level_max, constants.offset)
        return {name: round(v, 5) for name, v in self._areas(split, scores.anomaly_map, scores.image_score).items()}

    def _areas(self, split: Split, maps: Tensor, image_scores: Tensor) -> dict[str, float]:
        masks = torch.stack([self._decoded(sample).mask for sample in split.test])
        found = evaluate(maps, masks, image_scores, labels_of(split))
        return {name: float(getattr(found, name)) for name in ("image_auroc", "pixel_auroc", "aupro")}


def labels_of(split: Split) -> np.ndarray:
    """Return the labels bool [n] of the test images."""
    return np.array([sample.label for sample in split.test], dtype=bool)


def decisions(sides: Tensor, labels: np.ndarray) -> dict[str, float]:
    """Return the share of normal and of anomalous images beyond b_n, and beyond b_a."""
    values = sides.numpy()
    return {
        f"{kind}_beyond_{edge}": float(np.mean(values[chosen] >= side))
        for kind, chosen in (("normal", ~labels), ("anomalous", labels))
        for edge, side in (("b_n", 1), ("b_a", 2))
    }


def split_counts(run: Run, split: Split) -> dict[str, int]:
    """Return how many images of each kind there are; known ones also where the method does not learn from them."""
    anomalous = sum(sample.label for sample in split.test)
    return {
        "normals": len(split.normals),
        "known": len(split.known_anomalies),
        "known_used": len(split.known_anomalies) if run.method in LEARN_FROM_ANOMALIES else 0,
        "test_normal": len(split.test) - anomalous,
        "test_anomalous": anomalous,
    }
