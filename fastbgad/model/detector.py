"""The detector: a frozen backbone, one flow per feature level, and the constants of its decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..backbones import Backbone, create_backbone
from ..config import FlowConfig
from ..errors import CheckpointError, FastBGADError, FeatureError
from ..ops import Impl, MatmulPrecision, score_map
from ..ops.dispatch import renamed_precision
from ..system.checkpoint import load_checkpoint, save_checkpoint
from .flow import ConditionalFlow
from .scoring import Calibration, map_thresholds, patch_sides, sides


class Prediction(NamedTuple):
    """Prediction for a batch of images. Sides: 0 normal, 1 in the margin, 2 beyond the boundary b_a."""

    image_score: Tensor  # [B] float32, the maximum of the anomaly map
    image_side: Tensor  # [B] uint8, the side of the image score
    anomaly_map: Tensor  # [B, H, W] float32, high where patches are unlikely
    decision: Tensor  # [B, H, W] uint8, the side of every pixel of the map
    log_likelihoods: tuple[Tensor, ...]  # per level [B, h_l, w_l] float32, nats per dimension
    patch_sides: tuple[Tensor, ...]  # per level [B, h_l, w_l] uint8, by that level's own b_n and b_a


class BGAD(nn.Module):
    """Boundary-guided anomaly detection (Yao et al., CVPR 2023).

    Args:
        backbone: frozen feature extractor, see `fastbgad.create_backbone`.
        image_size: (height, width) of the images, in pixels.
        flow: shape of the normalizing flows.
        normalizer: log-likelihoods are divided by it before they meet the boundary.
        seed: seed of the flows' initial weights; the global random state is left alone. None: see `ConditionalFlow`.
        impl: which implementation of the operations to use, see `fastbgad.ops`.
        matmul_precision: operands of matrix products, see `fastbgad.ops.flow_forward`.
        precision: deprecated name of matmul_precision.

    A new model has random flows and no calibration: `fastbgad.fit` trains it, `BGAD.load` reads a trained one.

    Raises:
        FeatureError: the backbone cannot take images of this size; the message names sizes that it takes.
    """

    level_max: Tensor
    offset: Tensor
    boundaries: Tensor

    def __init__(
        self,
        backbone: Backbone,
        image_size: tuple[int, int] = (256, 256),
        *,
        flow: FlowConfig | None = None,
        normalizer: float = 10.0,
        seed: int | None = 0,
        impl: Impl = "auto",
        matmul_precision: MatmulPrecision = "auto",
        precision: MatmulPrecision | None = None,
    ) -> None:
        super().__init__()
        matmul_precision = renamed_precision(matmul_precision, precision)
        self.backbone = backbone
        self.image_size: tuple[int, int] = (int(image_size[0]), int(image_size[1]))
        backbone.check_image_size(*self.image_size)
        self.flow_config: FlowConfig = flow or FlowConfig()
        self.normalizer = normalizer
        self.impl: Impl = impl
        self.flows: nn.ModuleList = nn.ModuleList(
            ConditionalFlow(
                self.flow_config.spec(channels),
                seed=None if seed is None else 1000 * seed + level,
                impl=impl,
                matmul_precision=matmul_precision,
            )
            for level, channels in enumerate(backbone.channels)
        )
        levels = len(backbone.channels)
        self.register_buffer("level_max", torch.full((levels,), torch.nan))
        self.register_buffer("offset", torch.tensor(torch.nan))
        self.register_buffer("boundaries", torch.full((levels, 2), torch.nan))
        self.history: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """The device of the flows."""
        return self.level_max.device

    @property
    def calibrated(self) -> bool:
        """True if the model has calibration constants and boundaries."""
        return not bool(torch.isnan(self.offset))

    def flow(self, level: int) -> ConditionalFlow:
        """Return the flow of a level."""
        return cast(ConditionalFlow, self.flows[level])

    def set_calibration(self, calibration: Calibration) -> None:
        """Store the constants of `fastbgad.model.scoring.calibrate` as part of the model."""
        self.level_max.copy_(calibration.level_max)
        self.offset.copy_(calibration.offset)
        self.boundaries.copy_(calibration.boundaries)

    def calibration(self) -> Calibration:
        """Return the constants that turn log-likelihoods into scores; raise `FeatureError` if there are none."""
        if not self.calibrated:
            raise FeatureError(
                "this model has no calibration: if it was converted, convert it again with normal images (`fastbgad "
                "convert ... --data DIR`) or measure it with `fastbgad evaluate --calibration official`; otherwise "
                "train it (`fastbgad train`, fastbgad.fit) or load a trained one"
            )
        return Calibration(self.level_max, self.offset, self.boundaries)

    def thresholds(self) -> tuple[float, float]:
        """Return the anomaly-map scores that correspond to b_n and to b_a at every level."""
        b_n, b_a = map_thresholds(self.calibration(), self.normalizer).tolist()
        return b_n, b_a

    def forward(self, images: Tensor, *, impl: Impl | None = None) -> list[Tensor]:
        """Return log-likelihoods, per level [B, h_l, w_l] float32, of images [B, 3, H, W] uint8 or float in [0, 1]."""
        if images.shape[-2:] != self.image_size:
            height, width = self.image_size
            raise FeatureError(
                f"images are {images.shape[-2]} x {images.shape[-1]} pixels but the model works at {height} x {width}; "
                "resize them or train a model at their size"
            )
        with torch.no_grad():
            features = self.backbone(images.to(self.device))
        return [self.flow(level).log_likelihood_map(maps, impl=impl) for level, maps in enumerate(features)]

    @torch.inference_mode()
    def predict(self, images: Tensor, *, impl: Impl | None = None) -> Prediction:
        """Score images and decide on which side of the explicit boundary they, their pixels and their patches lie.

        An image scores the same alone or in any batch: all constants come from the training normals.

        Args:
            images: [B, 3, H, W] RGB at the model's image size, uint8 or floating point in [0, 1].
            impl: overrides the model's implementation.

        Returns:
            `Prediction`, on the model's device.

        Raises:
            FeatureError: wrong size, no calibration, or features that are not finite.
        """
        calibration = self.calibration()
        return self.decide(self(images, impl=impl), calibration=calibration, impl=impl)

    @torch.inference_mode()
    def decide(
        self, levels: Sequence[Tensor], *, calibration: Calibration | None = None, impl: Impl | None = None
    ) -> Prediction:
        """Return scores and sides from the log-likelihood maps that the model returns: the second half of `predict`.

        Args:
            levels: per level lp [B, h_l, w_l] float32, on the model's device.
            calibration: the model's own if None.
            impl: overrides the model's implementation.

        Raises:
            FeatureError: no calibration, or log-likelihoods that are not finite.
        """
        if calibration is None:
            calibration = self.calibration()
        # One reading for all levels: a single wait for the device.
        if not bool(torch.stack([torch.isfinite(lp).all() for lp in levels]).all()):
            raise FeatureError(
                "the features or their log-likelihoods contain NaN or Inf; check the backbone's weights and precision "
                "(float16 overflows in some backbones: use float32 or bfloat16)"
            )
        kind = impl or self.impl
        anomaly_map, image_score = score_map(
            levels, self.image_size, calibration.level_max, calibration.offset, impl=kind
        )
        edges = map_thresholds(calibration, self.normalizer)
        return Prediction(
            image_score,
            sides(image_score, edges[0], edges[1]),
            anomaly_map,
            sides(anomaly_map, edges[0], edges[1]),
            tuple(levels),
            patch_sides(levels, calibration.boundaries, self.normalizer),
        )

    def architecture(self) -> dict[str, Any]:
        """Return everything about the model that is not a tensor, for JSON."""
        return {
            "backbone": self.backbone.config(),
            "flow": asdict(self.flow_config),
            "image_size": list(self.image_size),
            "normalizer": self.normalizer,
        }

    def save(
        self, path: str | Path, history: Mapping[str, Any] | None = None, *, allow_uncalibrated: bool = False
    ) -> None:
        """Write the whole detector, backbone included, to one file, atomically.

        Args:
            path: usually `model.safetensors`.
            history: JSON-able facts about the training, kept in `BGAD.history`.
            allow_uncalibrated: also write a model without calibration, such as one converted from other code: it
                loads, and `fastbgad.evaluate_model` measures it with the official calibration.

        Raises:
            OutputError: the file cannot be written. FeatureError: the model has no calibration.
        """
        if not allow_uncalibrated:
            self.calibration()
        self.history = dict(history or self.history)
        save_checkpoint(
            path, "model", self.state_dict(), {"architecture": self.architecture(), "history": self.history}
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        impl: Impl = "auto",
        matmul_precision: MatmulPrecision = "auto",
        precision: MatmulPrecision | None = None,
    ) -> BGAD:
        """Read a detector that `save` wrote. Needs no download: the backbone's weights are in the file.

        Its flows are frozen for inference (`ConditionalFlow.freeze`).

        Raises:
            CheckpointError: missing, damaged, or not a model of this version of fastbgad.
        """
        matmul_precision = renamed_precision(matmul_precision, precision)
        tensors, metadata = load_checkpoint(path, "model")
        try:
            architecture = metadata["architecture"]
            backbone_config = dict(architecture["backbone"])
            if backbone_config["name"] != "gabor":
                backbone_config["weights"] = "random"  # overwritten below
                # models of versions without these options
                backbone_config.setdefault("standardize", "none")
                backbone_config.setdefault("neighborhood", 1)
            model = cls(
                create_backbone(**backbone_config),
                tuple(architecture["image_size"]),
                flow=FlowConfig(**architecture["flow"]),
                normalizer=architecture["normalizer"],
                seed=None,
                impl=impl,
                matmul_precision=matmul_precision,
            )
        except (KeyError, TypeError, FastBGADError) as error:
            raise CheckpointError(
                f"{path} describes a model that this fastbgad cannot build ({error}); use the version that wrote it"
            ) from error
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(
                f"the tensors in {path} do not fit the architecture it describes: {_first_lines(error)}"
            ) from error
        model.history = metadata.get("history", {})
        for level in range(len(model.flows)):
            model.flow(level).freeze()
        return model.to(device).eval()


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3])
