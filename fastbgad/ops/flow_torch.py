"""The portable fast path of the flow: plain PyTorch, arranged so that little is computed and less is stored.

Three things make it fast; the equations stay those of `fastbgad.reference.flow`:

- the positional condition enters through two small tables, A[w] + B[h], instead of a product over its P columns;
- constants are folded once per call: 0.1 into W2 and b2, g into W_perm, the offset through W_perm;
- rows go through all coupling layers in chunks whose hidden activations stay in the cache.

`infer` keeps one chunk's activations; `FlowFunction` keeps what its hand-written backward needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..flow_spec import CouplingWeights, FlowSpec
from .flow_tables import Bias, DenseBias, Folded, GatheredBias, RasterBias, fold, global_affine_scale, subnet_scale
from .log_likelihood import portable_log_likelihood
from .positional import PositionalRows

# At inference the hidden activations of a chunk stay in the cache (1.2 MB in float32 for C = 40). Training writes them
# to memory anyway, and longer chunks make fewer and larger products.
CHUNK_ROWS = 1024
TRAINING_CHUNK_ROWS = 4096


class Saved(NamedTuple):
    """What one layer keeps of one chunk of n rows for its backward."""

    x: Tensor  # [n, C], the layer's input
    hidden: Tensor  # [n, H], after the ReLU
    sigmoid: Tensor  # [n, C2], of twice the pre-activation: s = clamp (2 sigmoid - 1)
    scale: Tensor  # [n, C2], exp(s)
    y: Tensor  # [n, C], [x1, x2 exp(s) + a_t]


@torch.no_grad()
def infer(
    x: Tensor,  # [N, C] in the compute dtype
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    positions: PositionalRows | None,
    dense: Tensor | None,  # [N, P]
    return_z: bool,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """lp [N], log_det [N] and z [N, C] if asked, holding the activations of one chunk of rows at a time."""
    rows, c1, c2 = x.shape[0], spec.passive_channels, spec.active_channels
    folded = fold(layers, spec, positions, x.dtype, x.device)
    bias: Bias
    if positions is None:
        bias = DenseBias(dense)
    elif positions.index is None:
        bias = RasterBias(positions)
    else:
        bias = GatheredBias(positions, rows, x.device)
    log_g = torch.stack([layer.log_g for layer in folded]).sum()
    lp, log_det = x.new_empty(rows), x.new_empty(rows)
    z = torch.empty_like(x) if return_z else None

    chunks = list(bias.chunks(rows, chunk_rows))
    longest = max((stop - start for start, stop in chunks), default=0)
    hidden_buffer = x.new_empty(longest, folded[0].w1x.shape[1])
    a_buffer = x.new_empty(longest, 2 * c2)
    states = x.new_empty(longest, x.shape[1]), x.new_empty(longest, x.shape[1])
    scale_sum_buffer = x.new_empty(longest, c2)

    for start, stop in chunks:
        n = stop - start
        a = a_buffer[:n]
        state, following = states[0][:n], states[1][:n]
        scale_sum = scale_sum_buffer[:n].zero_()
        state.copy_(x[start:stop])
        for layer in folded:
            hidden = bias.fill(layer, start, stop, hidden_buffer[:n])
            hidden.addmm_(state[:, :c1], layer.w1x).relu_()
            torch.addmm(layer.b2, hidden, layer.w2, out=a)
            s, shift, active = a[:, :c2], a[:, c2:], state[:, c1:]
            s.sigmoid_().mul_(2 * spec.clamp).sub_(spec.clamp)
            scale_sum.add_(s)
            torch.addcmul(shift, active, s.exp_(), out=active)  # y = [x1, x2 exp(s) + a_t], in place
            torch.addmm(layer.out_bias, state, layer.w_out, out=following)  # W_perm (g y + offset)
            state, following = following, state
        torch.sum(scale_sum, dim=1, out=log_det[start:stop])
        log_det[start:stop].add_(log_g)
        lp[start:stop] = portable_log_likelihood(state, log_det[start:stop])
        if z is not None:
            z[start:stop] = state
    return lp, log_det, z


class FlowFunction(torch.autograd.Function):
    """lp, log_det and z of all rows, with gradients of x, of a dense condition and of every weight.

    Each chunk of rows keeps `Saved` of every layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, C]
        dense: Tensor | None,  # [N, P]
        positions: PositionalRows | None,
        spec: FlowSpec,
        chunk_rows: int,
        *weights: Tensor,  # the tensors of every layer, in the order of CouplingWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        c1, c2 = spec.passive_channels, spec.active_channels
        layers = unflatten(weights)
        folded = fold(layers, spec, positions, x.dtype, x.device)
        bias = DenseBias(dense) if positions is None else GatheredBias(positions, x.shape[0], x.device)
        log_g = torch.stack([layer.log_g for layer in folded]).sum()
        z = torch.empty_like(x)
        log_det = x.new_empty(x.shape[0])
        chunks = list(bias.chunks(x.shape[0], chunk_rows))
        saved: list[Tensor] = []
        for start, stop in chunks:
            state = x[start:stop]
            sigmoid_sum = x.new_zeros(stop - start, c2)
            for layer in folded:
                hidden = bias.fill(layer, start, stop, None).addmm_(state[:, :c1], layer.w1x).relu_()
                a = torch.addmm(layer.b2, hidden, layer.w2)
                sigmoid = torch.sigmoid(a[:, :c2])
                sigmoid_sum += sigmoid
                scale = torch.mul(sigmoid, 2 * spec.clamp).sub_(spec.clamp).exp_()
                y = torch.cat([state[:, :c1], torch.addcmul(a[:, c2:], state[:, c1:], scale)], dim=1)
                saved += Saved(state, hidden, sigmoid, scale, y)
                state = torch.addmm(layer.out_bias, y, layer.w_out)
            # sum(s) over all layers, with s = clamp (2 sigmoid - 1)
            scale_sum = sigmoid_sum.sum(dim=1).mul_(2 * spec.clamp).sub_(spec.clamp * c2 * len(folded))
            z[start:stop] = state
            log_det[start:stop] = scale_sum + log_g
        ctx.save_for_backward(z, *weights, *saved)
        ctx.spec, ctx.bias, ctx.chunks, ctx.positions, ctx.folded = spec, bias, chunks, positions, folded
        ctx.set_materialize_grads(False)
        return portable_log_likelihood(z, log_det), log_det, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_lp: Tensor | None, d_log_det: Tensor | None, d_z: Tensor | None) -> tuple[Any, ...]:
        spec: FlowSpec = ctx.spec
        folded: list[Folded] = ctx.folded
        z, *rest = ctx.saved_tensors
        count = 7 * spec.coupling_layers
        weights, saved = rest[:count], rest[count:]
        gradients = [LayerGradients(layer, spec) for layer in folded]

        # lp = (const - 1/2 |z|^2 + log_det) / C
        d_state = torch.zeros_like(z) if d_z is None else d_z.clone()
        d_det = z.new_zeros(z.shape[0]) if d_log_det is None else d_log_det.clone()
        if d_lp is not None:
            d_state.addcmul_(z, d_lp[:, None], value=-1 / z.shape[1])
            d_det.add_(d_lp, alpha=1 / z.shape[1])
        d_x = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        needs_dense = ctx.needs_input_grad[1]
        d_dense = z.new_zeros(z.shape[0], spec.condition_channels) if needs_dense else None

        longest = max((stop - start for start, stop in ctx.chunks), default=0)
        hidden_buffer = z.new_empty(longest, folded[0].w1x.shape[1])
        a_buffer = z.new_empty(longest, 2 * spec.active_channels)
        for chunk, (start, stop) in enumerate(ctx.chunks):
            d_hidden, da = hidden_buffer[: stop - start], a_buffer[: stop - start]
            d_out, d_scale = d_state[start:stop], d_det[start:stop, None]
            segments = ctx.bias.segments(start, stop) if isinstance(ctx.bias, GatheredBias) else None
            condition = ctx.bias.condition[start:stop] if folded[0].w1p is not None else None
            for index in reversed(range(len(folded))):
                at = len(Saved._fields) * (chunk * len(folded) + index)
                kept = Saved(*saved[at : at + len(Saved._fields)])
                d_out = gradients[index].accumulate(d_out, d_scale, kept, segments, condition, da, d_hidden)
                w1p = folded[index].w1p
                if d_dense is not None and w1p is not None:
                    d_dense[start:stop].addmm_(d_hidden, w1p.T)
            if d_x is not None:
                d_x[start:stop] = d_out
        total = d_det.sum()
        d_weights = [
            tensor
            for layer, gradient in zip(unflatten(weights), gradients, strict=True)
            for tensor in gradient.unfold(layer, total, ctx.positions)
        ]
        return d_x, d_dense, None, None, None, *d_weights


class LayerGradients:
    """Gradients of one layer's folded weights, summed over chunks, then carried back to the layer's own weights."""

    def __init__(self, layer: Folded, spec: FlowSpec) -> None:
        self.spec = spec
        self.slope = torch.ones_like(layer.b2)
        self.slope[: spec.active_channels] = 2 * spec.clamp
        # The layer's weights as the backward products want them: [2 * C2, H], [H, C1] and [C, C].
        self.w2_rows = layer.w2.T.contiguous() * self.slope[:, None]
        self.w1x_rows, self.w_out_rows = layer.w1x.T.contiguous(), layer.w_out.T.contiguous()
        self.w1x = torch.zeros_like(self.w1x_rows)  # [H, C1]
        self.w2 = torch.zeros_like(self.w2_rows)  # [2 * C2, H]
        self.b2 = torch.zeros_like(layer.b2)
        self.y_sum = torch.zeros_like(layer.g)  # sum over rows of dy
        self.y_dot = torch.zeros_like(layer.g)  # sum over rows of dy * y
        self.bias = torch.zeros_like(layer.bias)
        self.tables = torch.zeros_like(layer.tables) if layer.tables is not None else None
        self.w1p = torch.zeros_like(layer.w1p.T) if layer.w1p is not None else None  # [H, P]

    def accumulate(
        self,
        d_out: Tensor,  # [n, C]
        d_scale: Tensor,  # [n, 1], gradient of log_det
        kept: Saved,
        segments: tuple[Tensor, Tensor] | None,
        condition: Tensor | None,  # [n, P]
        da: Tensor,  # [n, 2 * C2], scratch
        d_hidden: Tensor,  # [n, H], filled with the gradient before the ReLU
    ) -> Tensor:
        """Adds one chunk's gradients; returns dx [n, C]."""
        c1, c2 = self.spec.passive_channels, self.spec.active_channels
        x1, x2 = kept.x[:, :c1], kept.x[:, c1:]
        dy = d_out @ self.w_out_rows  # out = W_perm diag(g) y + W_perm offset
        self.y_sum += dy.sum(dim=0)
        self.y_dot += (dy * kept.y).sum(dim=0)

        # y2 = x2 exp(s) + a_t and s = clamp (2 sigmoid - 1); the factor 2 clamp of ds/da is in w2_rows and in unfold
        ds, dy2 = da[:, :c2], dy[:, c1:]
        da[:, c2:] = dy2
        dx2 = dy2.mul_(kept.scale)
        torch.addcmul(d_scale, dx2, x2, out=ds)
        torch.ops.aten.sigmoid_backward.grad_input(ds, kept.sigmoid, grad_input=ds)
        self.w2.addmm_(da.T, kept.hidden)
        self.b2 += da.sum(dim=0)

        torch.mm(da, self.w2_rows, out=d_hidden)
        torch.ops.aten.threshold_backward.grad_input(d_hidden, kept.hidden, 0, grad_input=d_hidden)
        self.w1x.addmm_(d_hidden.T, x1)
        if segments is not None and self.tables is not None:
            rows, offsets = segments
            self.tables += embedding_bag(rows, d_hidden, offsets, mode="sum")
        else:
            self.bias += d_hidden.sum(dim=0)
            if condition is not None and self.w1p is not None:
                self.w1p.addmm_(d_hidden.T, condition)
        dy[:, :c1].addmm_(d_hidden, self.w1x_rows)
        return dy

    def unfold(
        self,
        layer: CouplingWeights,
        d_log_det: Tensor,  # scalar, sum over rows of the gradient of log_det
        positions: PositionalRows | None,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of a `CouplingWeights`, in its order; W_perm is fixed and gets None."""
        scale = self.slope * subnet_scale(self.spec, self.b2)
        g, dg_dp = global_affine_scale(layer.global_scale.to(self.b2.dtype), self.spec.global_affine)
        d_bias, d_w1 = self.bias, self.w1x
        if self.tables is not None and positions is not None:
            # A = code_w W1w^T + b1 and B = code_h W1h^T
            column_code, row_code = positions.codes(self.b2.dtype, self.b2.device)
            d_columns, d_lines = self.tables[: positions.width], self.tables[positions.width :]
            d_w1 = torch.cat([d_w1, d_columns.T @ column_code, d_lines.T @ row_code], dim=1)
            d_bias = d_columns.sum(dim=0)
        elif self.w1p is not None:
            d_w1 = torch.cat([d_w1, self.w1p], dim=1)
        # v = g y + offset and dv = dy / g, so dg = sum(dv y) and doffset = sum(dv); log_det adds sum(log g) per row
        d_g = (self.y_dot + d_log_det) / g
        gradients = (d_w1, d_bias, scale[:, None] * self.w2, scale * self.b2, d_g * dg_dp, self.y_sum / g)
        return *(gradient.to(p.dtype) for gradient, p in zip(gradients, layer, strict=False)), None


def unflatten(weights: Sequence[Tensor]) -> list[CouplingWeights]:
    """The tensors of all layers in one sequence, seven per layer, as layers again."""
    size = len(CouplingWeights._fields)
    return [CouplingWeights(*weights[i : i + size]) for i in range(0, len(weights), size)]
