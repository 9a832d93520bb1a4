"""The stages of inference, from image files to metrics, as calls that can be timed one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import Sample, read_image, resize_image
from ..evaluate.metrics import pixel_metrics
from ..model.detector import BGAD, Prediction

DECODE, UPLOAD, BACKBONE, SCORING, METRICS = "decode", "host to device", "backbone", "scoring", "metrics"


class Work:
    """One batch on its way through the stages: each stores its results here for the next.

    Args:
        model: with calibration constants.
        pool: threads that decode.
        samples: all images.
        masks: bool [n, H, W], one per sample; None leaves the metrics out.

    Attributes:
        stages: the calls by name, to be made in this order, in `torch.inference_mode`.
        levels: per level lp [B, h, w], after the flows.
    """

    images: Tensor  # uint8 [B, 3, H, W]
    features: list[Tensor]  # per level [B, C, h, w]
    prediction: Prediction

    def __init__(
        self, model: BGAD, pool: ThreadPoolExecutor, samples: Sequence[Sample], masks: Tensor | None = None
    ) -> None:
        self.model: BGAD = model
        self.pool: ThreadPoolExecutor = pool
        self.samples: Sequence[Sample] = samples
        self.masks: Tensor | None = masks
        self.numbers: list[int] = []
        self.levels: list[Tensor] = []
        self.stages: dict[str, Callable[[], object]] = {DECODE: self._decode}
        if model.device.type != "cpu":
            self.stages[UPLOAD] = self._upload
        self.stages[BACKBONE] = self._extract
        for level, name in enumerate(flow_names(model)):
            self.stages[name] = partial(self._flow, level)
        self.stages[SCORING] = self._score
        if masks is not None:
            self.stages[METRICS] = self._metrics

    def begin(self, numbers: list[int]) -> None:
        """Choose the samples of the next batch and free the results of the last one."""
        for name in ("images", "features", "prediction"):
            self.__dict__.pop(name, None)
        self.numbers, self.levels = numbers, []

    def run(self) -> None:
        """Run all stages."""
        for stage in self.stages.values():
            stage()

    def _decode(self) -> None:
        size = self.model.image_size
        pictures = list(self.pool.map(lambda number: load_image(self.samples[number], size), self.numbers))
        self.images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def _upload(self) -> None:
        self.images = self.images.to(self.model.device)

    def _extract(self) -> None:
        self.features = self.model.backbone(self.images)

    def _flow(self, level: int) -> None:
        self.levels.append(self.model.flow(level).log_likelihood_map(self.features[level]))

    def _score(self) -> None:
        self.prediction = self.model.decide(self.levels)
        self.prediction.image_score.tolist()  # waits until the host has the scores

    def _metrics(self) -> None:
        assert self.masks is not None
        pixel_metrics(self.prediction.anomaly_map, self.masks[self.numbers])


def flow_names(model: BGAD) -> list[str]:
    """Return the names of the flows as stages, by their levels in timm's numbering."""
    return [f"flow {level}" for level in model.backbone.config()["levels"]]


def load_image(sample: Sample, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a sample's image at `size` (height, width), uint8 [H, W, 3]; raise `DataError` if it cannot be read."""
    return resize_image(read_image(sample.image, sample.decoding.bit_depth), size)
