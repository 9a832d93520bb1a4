"""Acceleration of anomalib's `CflowModel`: whole maps go through its flows instead of 64 patches at a time.

anomalib runs its flows on one batch of patches after another and joins the results. Rows do not depend on each other,
so one call per level gives the same. The condition of a call is its positions instead of 128 channels of encoding, and
the frozen encoder is prepared for inference once (`fastbgad.backbones.frozen_network`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...backbones.frozen_network import FrozenCopy, with_child
from ...errors import UnsupportedFlowError
from ...ops import PositionalRows
from ...ops.log_likelihood.portable import log_likelihood_of_norm
from .class_swap import exporting, original_class, rebuild


def looks_like_cflow(module: nn.Module) -> bool:
    """Return True for anomalib's `CflowModel`."""
    return type(module).__name__ == "CflowModel" and type(module).__module__.startswith("anomalib.")


def check_cflow(model: nn.Module, name: str) -> None:
    """Raise `UnsupportedFlowError` for a `CflowModel` that lacks attributes which `AcceleratedCflow` needs."""
    needed = ("encoder", "decoders", "pool_layers", "condition_vector", "anomaly_map_generator")
    missing = [attribute for attribute in needed if not hasattr(model, attribute)]
    if missing:
        raise UnsupportedFlowError(
            f"{name} cannot be accelerated: this anomalib's CflowModel lacks {', '.join(missing)}; anomalib 2 has them"
        )


class AcceleratedCflow(nn.Module):
    """Mixin before `CflowModel`: whole maps go through the flows, the rest is anomalib's own."""

    encoder: nn.Module
    decoders: nn.ModuleList
    pool_layers: Sequence[str]
    condition_vector: int
    anomaly_map_generator: nn.Module
    _fastbgad: FrozenCopy

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """Return anomalib's `InferenceBatch` of images [B, 3, H, W]: pred_score [B] and anomaly_map [B, H, W].

        An export gets a graph of FrEIA's arithmetic on whole maps, whose size does not depend on the image's.
        """
        from anomalib.data import InferenceBatch

        self.encoder.eval()
        features = self._features(images)
        levels = [
            self._log_likelihoods(decoder, features[layer])
            for decoder, layer in zip(self.decoders, self.pool_layers, strict=True)
        ]
        anomaly_map = self.anomaly_map_generator(
            distribution=[lp.flatten() for lp in levels],
            height=[lp.shape[1] for lp in levels],
            width=[lp.shape[2] for lp in levels],
            image_size=images.shape[-2:],
        )
        return InferenceBatch(pred_score=torch.amax(anomaly_map, dim=(-2, -1)), anomaly_map=anomaly_map)

    def _log_likelihoods(self, decoder: nn.Module, maps: Tensor) -> Tensor:
        """Return lp [B, h, w] of a level's features [B, C, h, w]."""
        batch, channels, height, width = maps.shape
        rows = maps.permute(0, 2, 3, 1).reshape(-1, channels)
        positions = PositionalRows(height, width, channels=self.condition_vector)
        if exporting():
            condition = positions.dense(height * width, rows.dtype, rows.device).repeat(batch, 1)
            z, log_det = decoder(rows, [condition])
            lp = log_likelihood_of_norm(z.square().sum(dim=1), log_det, channels)
        else:
            lp = cast(Any, decoder).log_likelihood(rows, positions)
        return lp.view(batch, height, width)

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.encoder(images)
        extractor = getattr(self.encoder, "feature_extractor", None)
        if not isinstance(extractor, nn.Module):
            return self.encoder(images)
        return with_child(self.encoder, "feature_extractor", self._fastbgad.of(extractor, images))(images)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._fastbgad.forget()
        return super()._apply(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduce to the mixin and the original class, since the class of this object has no importable name."""
        return rebuild, (AcceleratedCflow, original_class(self)), self.__dict__.copy()
