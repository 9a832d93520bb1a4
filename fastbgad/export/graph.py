"""The detector as one traceable graph, which `fastbgad.export` writes to files.

Nothing here chooses a backend, loops over rows or calls a kernel: other runtimes have every operation. Everything that
does not depend on the image is computed before, in float64: the positional condition becomes two small tables per
coupling layer, and the global affine is folded into the permutation (see `fastbgad.ops.flow.folded`), so the graph
holds neither a positional encoding nor a softplus.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..backbones import Backbone
from ..flow_spec import FlowSpec
from ..model.detector import BGAD
from ..model.flow import ConditionalFlow
from ..model.scoring import Calibration, map_thresholds
from ..ops import PositionalRows
from ..ops.flow.folded import Folded, fold_flow

ANOMALY_MAP, IMAGE_SCORE, IMAGE_SIDE, DECISION = "anomaly_map", "image_score", "image_side", "decision"
# Followed by the number of the level, counted from 0.
LOG_LIKELIHOOD, LEVEL_MAX = "log_likelihood_", "level_max_"


class ExportedCoupling(nn.Module):
    """One coupling layer on whole maps, channels last; its constants are float32 buffers, folded in float64.

    Args:
        folded: the layer's constants, float64.
        spec: the shape of the flow.
        width: width of the maps.
        offset: [C], the global affine's offset, for the last layer only. The last layer leaves W_perm out: the
            log-likelihood depends on |z|^2 only, which an orthogonal matrix does not change.
    """

    w1: Tensor
    columns: Tensor
    lines: Tensor
    w2: Tensor
    b2: Tensor
    w_out: Tensor
    order: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, folded: Folded, spec: FlowSpec, width: int, offset: Tensor | None) -> None:
        super().__init__()
        self.split: list[int] = [spec.passive_channels, spec.active_channels]
        self.clamp: float = spec.clamp
        self.positional: bool = folded.tables is not None
        self.reordered: bool = offset is None and folded.moved is not None
        self.mixed: bool = offset is None and not self.reordered
        constants = {"w1": folded.w1x, "columns": folded.bias, "w2": folded.w2.T, "b2": folded.b2[:, 0]}
        if folded.tables is not None:
            constants |= {"columns": folded.tables[:width], "lines": folded.tables[width:, None]}
        if offset is not None:
            constants |= {"scale": folded.g, "shift": offset}
        elif folded.moved is not None and folded.g_out is not None:
            self.register_buffer("order", folded.moved)
            constants |= {"scale": folded.g_out[:, 0], "shift": folded.out_bias[:, 0]}
        elif folded.w_out is not None:
            constants |= {"w_out": folded.w_out.T, "shift": folded.out_bias[:, 0]}
        for name, value in constants.items():
            self.register_buffer(name, value.to(torch.float32).contiguous())

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next state [B, h, w, C] and the log-scales s [B, h, w, C2] of a state, all float32."""
        passive, active = state.split(self.split, dim=-1)
        hidden = passive @ self.w1 + self.columns
        if self.positional:
            hidden = hidden + self.lines
        half_s, a_t = (torch.relu(hidden) @ self.w2 + self.b2).chunk(2, dim=-1)
        # The weights of s include a factor of 2: clamp * tanh(a) = 2 clamp * sigmoid(2 a) - clamp.
        s = torch.sigmoid(half_s) * (2 * self.clamp) - self.clamp
        y = torch.cat([passive, active * torch.exp(s) + a_t], dim=-1)
        if self.mixed:
            return y @ self.w_out + self.shift, s
        if self.reordered:
            y = y.index_select(-1, self.order)
        return y * self.scale + self.shift, s


class ExportedFlow(nn.Module):
    """The flow of a level for feature maps of one size; it computes `ConditionalFlow.log_likelihood_map`.

    The number of operations depends on the coupling layers alone: all rows of a level go through a layer at once. So
    the hidden activations of an image, [h, w, H] float32, are in memory as a whole (78 MB for the finest level of
    tf_efficientnet_b6 at 1024 pixels, 1.2 GB at 4096), where fastbgad itself holds one chunk that fits the cache.

    Args:
        flow: read once; later changes of its weights have no effect on this module.
        size: (height, width) of the feature maps.
    """

    def __init__(self, flow: ConditionalFlow, size: tuple[int, int]) -> None:
        super().__init__()
        spec, weights = flow.spec, flow.weights()
        positions = PositionalRows(*size, channels=spec.condition_channels) if spec.condition_channels else None
        folded = fold_flow(weights, spec, positions, torch.float64).layers
        last_offset = weights[-1].global_offset.detach().double()
        self.layers: nn.ModuleList = nn.ModuleList(
            ExportedCoupling(layer, spec, size[1], last_offset if layer is folded[-1] else None) for layer in folded
        )
        self.channels: int = spec.channels
        log_g = math.fsum(float(layer.log_g) for layer in folded)
        self.constant: float = log_g / spec.channels - 0.5 * math.log(2 * math.pi)

    def forward(self, features: Tensor) -> Tensor:
        """Return lp [B, h, w] float32, nats per dimension, of features [B, C, h, w] of any floating-point type."""
        state, log_scales = features.permute(0, 2, 3, 1).to(torch.float32), []
        for layer in self.layers:
            state, s = layer(state)
            log_scales.append(s.sum(dim=-1))
        log_det = functools.reduce(torch.add, log_scales)
        # lp = (log|det J| - |z|^2 / 2) / C - log(2 pi) / 2
        return (log_det - 0.5 * state.square().sum(dim=-1)) / self.channels + self.constant


class ExportedDetector(nn.Module):
    """Backbone, flows and scoring of a calibrated model as one graph, for float32 images of the model's size.

    It computes the same as `BGAD.predict` without the checks, since a graph cannot raise errors: images beyond [0, 1]
    silently give wrong scores. A pixel whose score is NaN counts as beyond the boundary, never as normal.

    Args:
        model: a trained model in evaluation mode. Its backbone is shared, not copied; flows and calibration are read
            once.

    Raises:
        FeatureError: the model has no calibration, or its backbone cannot take images of its size.
    """

    offset: Tensor
    normal_edge: Tensor
    anomalous_edge: Tensor

    def __init__(self, model: BGAD) -> None:
        super().__init__()
        self.size: tuple[int, int] = model.image_size
        for name, value in scoring_constants(model.calibration(), model.normalizer).items():
            self.register_buffer(name, value)
        self.backbone: Backbone = model.backbone
        with torch.no_grad():
            features = model.backbone(torch.full((1, 3, *self.size), 0.5, device=model.device))
        self.flows: nn.ModuleList = nn.ModuleList(
            ExportedFlow(model.flow(level), (maps.shape[2], maps.shape[3])) for level, maps in enumerate(features)
        )
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Score images [B, 3, H, W] float32, RGB in [0, 1].

        Returns:
            `anomaly_map` [B, H, W] float32, `image_score` [B] float32, `image_side` [B] uint8 and `decision`
            [B, H, W] uint8 (0 normal, 1 in the margin, 2 beyond the boundary), and for every level l, counted from 0,
            `log_likelihood_l` [B, h_l, w_l] float32; as in `fastbgad.Prediction`.
        """
        levels = [flow(maps) for flow, maps in zip(self.flows, self.backbone(images), strict=True)]
        anomaly_map = self._anomaly_map(levels)
        # Not `>`, which would make NaN normal.
        beyond_b_n, beyond_b_a = ~(anomaly_map <= self.normal_edge), ~(anomaly_map <= self.anomalous_edge)
        # In 32 bits, since few runtimes add 8-bit integers.
        decision = beyond_b_n.to(torch.int32) + beyond_b_a.to(torch.int32)
        return {
            ANOMALY_MAP: anomaly_map,
            IMAGE_SCORE: anomaly_map.amax(dim=(1, 2)),
            IMAGE_SIDE: decision.amax(dim=(1, 2)).to(torch.uint8),
            DECISION: decision.to(torch.uint8),
            **{f"{LOG_LIKELIHOOD}{level}": lp for level, lp in enumerate(levels)},
        }

    def _anomaly_map(self, levels: list[Tensor]) -> Tensor:
        """Return the anomaly map [B, H, W]; see `fastbgad.ops.score_map`."""
        likelihoods = [torch.exp(lp - self.get_buffer(f"{LEVEL_MAX}{level}")) for level, lp in enumerate(levels)]
        upsampled = [
            interpolate(maps[:, None], size=self.size, mode="bilinear", align_corners=True) for maps in likelihoods
        ]
        return (self.offset - functools.reduce(torch.add, upsampled))[:, 0]


def scoring_constants(calibration: Calibration, normalizer: float) -> dict[str, Tensor]:
    """Return the constants that turn log-likelihoods into scores and sides, by name in the graph, float32 [1, 1, 1].

    They are buffers of their own in the graph, so that a loader can replace them.
    """
    normal_edge, anomalous_edge = map_thresholds(calibration, normalizer)
    scalars = {"offset": calibration.offset, "normal_edge": normal_edge, "anomalous_edge": anomalous_edge}
    scalars |= {f"{LEVEL_MAX}{level}": value for level, value in enumerate(calibration.level_max)}
    # With a dimension less, Inductor would write them into the code.
    return {name: value.detach().clone().reshape(1, 1, 1) for name, value in scalars.items()}
