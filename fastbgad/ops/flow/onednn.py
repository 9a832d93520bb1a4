"""Inference of a wide flow on a CPU with prepared weights: products by oneDNN, with weights laid out once.

MKL brings the weights of a product into its own layout at every call. With the 64 to 1000 rows of a coarse feature map
and some hundred channels that costs as much as a third of the arithmetic; oneDNN takes weights that were laid out
before. Rows come first here, [n, C]: with that many channels every slice of a row is long enough for element-wise
operations to be quick; narrower flows need the layout of `portable`. Equations: `fastbgad.reference.flow`.

The operators are those that torch.compile's freezing uses on a CPU; they are private, so `available` looks first.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...flow_spec import FlowSpec
from ..log_likelihood.portable import log_likelihood_of_norm
from ..positional import PositionalRows
from ..reused_memory import Block
from .backend import FlowCall, FlowResult
from .folded import Folded, fold_flow, map_size
from .hidden_bias import Bias, Chunk, hidden_bias_of

# Measured: from here on the laid-out weights outweigh the shorter slices.
FEWEST_CHANNELS = 400
# Bytes of hidden activations that go through the layers together: they should stay in the cache.
CHUNK_BYTES = 4 * 2**20


class OnednnLayer(NamedTuple):
    """One coupling layer as in `Folded`, with the weights of its products in oneDNN's layout."""

    folded: Folded  # for the hidden bias
    w1x: Tensor  # [H, C1], laid out
    w2: Tensor  # [2 * C2, H], laid out
    b2: Tensor  # [2 * C2]
    passive: Half  # becomes x1 of the next layer
    active: Half  # and x2


class Half(NamedTuple):
    """Half of the channels of W_perm (g y + offset), [C1 or C2]."""

    w_out: Tensor | None  # the rows of W_perm diag(g), laid out; None for a hard permutation
    moved: Tensor | None  # int64, for a hard permutation
    g: Tensor | None
    bias: Tensor

    def of(self, y: Tensor) -> Tensor:
        """Return this half of the layer's output, [n, C1 or C2], from y [n, C]."""
        if self.w_out is not None:
            return _product(y, self.w_out, self.bias)
        assert self.moved is not None
        assert self.g is not None
        return torch.addcmul(self.bias, torch.index_select(y, 1, self.moved), self.g)


class OnednnWeights(NamedTuple):
    """Prepared weights of the oneDNN backend for one size of maps; float32."""

    layers: list[OnednnLayer]
    map_size: tuple[int, int] | None

    def serves(self, positions: PositionalRows | None, dtype: torch.dtype) -> bool:
        """Return whether they fit a condition and a type."""
        return dtype == torch.float32 and self.map_size == map_size(positions)


def available(spec: FlowSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether this backend exists for such a flow and is quicker than the portable one."""
    return device.type == "cpu" and dtype == torch.float32 and spec.channels >= FEWEST_CHANNELS and _has_operators()


@torch.no_grad()
def prepare(call: FlowCall) -> OnednnWeights:
    """Fold the constants of every layer, then lay out its weights for chunks of about as many rows as a call has."""
    rows = min(len(call.x), _chunk_rows(call.spec))
    c1 = call.spec.passive_channels
    layers = []
    for layer in fold_flow(call.layers, call.spec, call.positions, torch.float32).layers:
        halves = []
        for part in (slice(0, c1), slice(c1, None)):
            bias = layer.out_bias[part, 0].contiguous()
            if layer.w_out is not None:
                halves.append(Half(_laid_out(layer.w_out[part], rows), None, None, bias))
            else:
                assert layer.moved is not None
                assert layer.g_out is not None
                halves.append(Half(None, layer.moved[part].contiguous(), layer.g_out[part, 0].contiguous(), bias))
        # the laid-out weights replace these
        bias_only = layer._replace(w1x=layer.w1x.new_empty(0), w2=layer.w2.new_empty(0), w_out=None)
        w1x, w2 = _laid_out(layer.w1x.T, rows), _laid_out(layer.w2, rows)
        layers.append(OnednnLayer(bias_only, w1x, w2, layer.b2[:, 0].contiguous(), *halves))
    return OnednnWeights(layers, map_size(call.condition))


@torch.no_grad()
def infer(call: FlowCall, prepared: object = None) -> FlowResult:
    """Return lp [N], log_det [N] and z [N, C] if asked; see `portable.infer`."""
    call = call.gathered()
    x, spec, positions, dense = call.x.to(torch.float32), call.spec, call.positions, call.dense
    if not (isinstance(prepared, OnednnWeights) and prepared.serves(positions, call.dtype)):
        prepared = prepare(call)
    bias = hidden_bias_of(positions, None if dense is None else dense.to(torch.float32), x)
    log_g = torch.stack([layer.folded.log_g for layer in prepared.layers]).sum()
    lp, log_det = x.new_empty(len(x)), x.new_empty(len(x))
    z = torch.empty_like(x) if call.options.return_z else None
    for chunk in bias.chunks(len(x), _chunk_rows(spec), 1):
        here = slice(chunk.start, chunk.stop)
        squared, log_det[here] = _chunk(x[here], prepared.layers, spec, bias, chunk, None if z is None else z[here])
        log_det[here].add_(log_g)
        lp[here] = log_likelihood_of_norm(squared, log_det[here], spec.channels)
    return lp, log_det, z


def _chunk(
    x: Tensor, layers: list[OnednnLayer], spec: FlowSpec, bias: Bias, chunk: Chunk, z: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return |z|^2 [n] and sum(s) [n] of n rows."""
    rows, c1, clamp = len(x), spec.passive_channels, spec.clamp
    block = Block(rows * spec.hidden_channels, x)
    hidden_bias = block.view(1, rows, spec.hidden_channels)
    x1, x2 = x[:, :c1].contiguous(), x[:, c1:]
    y, scale_sum = torch.empty_like(x), x.new_zeros(rows)
    for layer in layers:
        bias.fill(layer.folded, chunk, hidden_bias)
        hidden = _product(x1, layer.w1x, None).add_(hidden_bias[0]).relu_()
        s, shift = _product(hidden, layer.w2, layer.b2).split(spec.active_channels, dim=1)
        s.sigmoid_().mul_(2 * clamp).sub_(clamp)
        scale_sum.add_(s.sum(dim=1))
        y[:, :c1] = x1
        torch.addcmul(shift, x2, s.exp_(), out=y[:, c1:])  # y = [x1, x2 exp(s) + a_t]
        x1, x2 = layer.passive.of(y), layer.active.of(y)  # W_perm (g y + offset)
    if z is not None:
        torch.cat([x1, x2], dim=1, out=z)
    return x1.square().sum(dim=1).add_(x2.square().sum(dim=1)), scale_sum


def _chunk_rows(spec: FlowSpec) -> int:
    return max(64, CHUNK_BYTES // (4 * spec.hidden_channels))


def _laid_out(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def _has_operators() -> bool:
    """Return whether PyTorch's private operators exist and compute what is expected."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = torch.eye(3), torch.arange(12.0).view(4, 3), torch.ones(4)
    try:
        return torch.equal(_product(x, _laid_out(weight, 3), bias), weight.T + bias)
    except (AttributeError, RuntimeError, TypeError):
        return False
