"""BGAD's torch model for anomalib, and a post-processor with thresholds at BGAD's own boundary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import FeatureError, MissingDependencyError
from ...export.graph import ANOMALY_MAP, IMAGE_SCORE, ExportedDetector
from ...model.detector import BGAD
from ...ops import score_map

try:
    from anomalib.data import InferenceBatch
    from anomalib.post_processing import PostProcessor
except ModuleNotFoundError as error:
    raise MissingDependencyError(error.name or "anomalib", "peers", "fastbgad.compat.anomalib") from error


class BgadModel(nn.Module):
    """The detector with the interface of anomalib's torch models: images in, an `InferenceBatch` out.

    Args:
        detector: backbone, flows and calibration.
    """

    image_size: Tensor

    def __init__(self, detector: BGAD) -> None:
        super().__init__()
        self.detector: BGAD = detector
        for level in range(len(detector.flows)):
            detector.flow(level).freeze()  # a training step changes the weights, which the flow notices
        self.exported: ExportedDetector | None = None
        # Scores are calibrated for maps of one size, so the checkpoint holds it. (0, 0) before training.
        self.register_buffer("image_size", torch.zeros(2, dtype=torch.int64))
        self.register_load_state_dict_post_hook(_take_image_size)

    def set_image_size(self, size: tuple[int, int]) -> None:
        """Set the (height, width) in pixels of the images that the model is trained for."""
        self.detector.image_size = size
        self.image_size.copy_(torch.tensor(size))

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images [B, 3, H, W], float32 RGB in [0, 1], not normalized (the backbone does that).

        Returns:
            `pred_score` [B] float32, the maximum of the anomaly map, and `anomaly_map` [B, 1, H, W] float32; both high
            where patches are unlikely, and the same whatever else is in the batch.

        Raises:
            FeatureError: no calibration, images of another size than in training, or results that are not finite.
        """
        if self.exported is not None:
            outputs = self.exported(images)
            return InferenceBatch(pred_score=outputs[IMAGE_SCORE], anomaly_map=outputs[ANOMALY_MAP][:, None])
        detector = self.detector
        if not detector.calibrated:
            raise FeatureError("this Bgad was never trained: run Engine.fit, or load a checkpoint")
        calibration = detector.calibration()
        with torch.no_grad():
            levels = detector(images)
            scores = score_map(
                levels, detector.image_size, calibration.level_max, calibration.offset, impl=detector.impl
            )
        if not bool(torch.isfinite(scores.image_score).all()):
            raise FeatureError(
                "the features or their log-likelihoods contain NaN or Inf; check the backbone's weights and precision"
            )
        return InferenceBatch(pred_score=scores.image_score, anomaly_map=scores.anomaly_map[:, None])


class BoundaryPostProcessor(PostProcessor):
    """anomalib's post-processor with the thresholds at BGAD's explicit boundary.

    An image or a pixel is anomalous if its score lies beyond b_a, as in `BGAD.predict`. Scores are normalized so that
    b_a is 0.5 and those of the validation images lie in [0, 1].

    anomalib itself takes the threshold that separates the validation images best. That needs anomalous images among
    them, and the threshold is the score of one of them. It may be the highest possible score: very unlikely patches
    all have the same score of BGAD, to the last bit, and then no image lies beyond the threshold. anomalib's
    normalized scores can also leave [0, 1] and are clipped, which loses a part of the ranking for its metrics.

    Arguments are those of `anomalib.post_processing.PostProcessor`.
    """

    def set_boundary(self, score: float, highest: float) -> None:
        """Set the threshold of images and pixels, and the range of scores that is used where nothing is validated.

        Args:
            score: of b_a, see `BGAD.thresholds`.
            highest: the score of a pixel whose patches have likelihood 0; that of the most normal pixel is 0.
        """
        for threshold in (self._image_threshold, self._pixel_threshold):
            threshold.fill_(score)
        for low, high in ((self.image_min, self.image_max), (self.pixel_min, self.pixel_max)):
            low.fill_(0)
            high.fill_(highest)
        self._center()

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Update the range of scores, and no threshold."""
        del trainer, pl_module, args, kwargs
        if self.enable_normalization:
            self._image_min_max_metric.update(outputs)
            self._pixel_min_max_metric.update(outputs)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the range of the validation images' scores."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._center()

    def _center(self) -> None:
        """Widen the ranges so that the thresholds are their centers."""
        for low, high, threshold in (
            (self.image_min, self.image_max, self.image_threshold),
            (self.pixel_min, self.pixel_max, self.pixel_threshold),
        ):
            half = torch.maximum(threshold - low, high - threshold)
            low.copy_(threshold - half)
            high.copy_(threshold + half)


def _take_image_size(module: nn.Module, _: object) -> None:
    """Pass the image size of a checkpoint on to the detector."""
    assert isinstance(module, BgadModel)
    height, width = module.image_size.tolist()
    if height:
        module.detector.image_size = (height, width)
