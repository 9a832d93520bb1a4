"""The portable fast path of the flow with gradients: a forward that keeps activations, and a backward by hand.

The arithmetic and the tiles of the forward are those of `portable`. Gradients of weights are summed per tile, and the
tiles' sums are added in order: the same number of threads gives the same bits.

With `operands` of another type (bfloat16) the hidden activations and the operands of the subnets' products are of that
type; the state, the permutation, log_det and every sum over rows and layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...flow_spec import CouplingWeights, FlowSpec
from ..log_likelihood.portable import portable_log_likelihood
from ..positional import PositionalRows
from ..reused_memory import Block
from .backend import FlowCall, FlowResult, unflatten
from .folded import Folded, fold_flow, global_affine_scale, subnet_scale
from .hidden_bias import Bias, Chunk, DenseBias, GatheredBias
from .portable import most_tiles

# Activations are written to memory whatever the chunk, and larger chunks make fewer operations.
TILE_ROWS = 512
# Each has sums of its own for the gradients of the large weights, which must not outgrow what they are sums of.
MOST_TILES = 8
MOST_SUM_BYTES = 8 * 2**20  # per layer


def train(call: FlowCall) -> FlowResult:
    """Return lp [N], log_det [N] and z [N, C] if asked, with gradients of x, a dense condition and the weights."""
    call = call.gathered()
    options, dense = call.options, call.dense
    operands = call.dtype
    if options.matmul_precision == "bfloat16" and call.dtype == torch.float32:
        operands = torch.bfloat16
    lp, log_det, z = FlowFunction.apply(
        call.x.to(call.dtype),
        None if dense is None else dense.to(call.dtype),
        call.positions,
        call.spec,
        options.chunk_rows,
        operands,
        *call.weights,
    )
    return lp, log_det, z if options.return_z else None


class Saved(NamedTuple):
    """Saved activations of one layer for one chunk of T tiles of n rows: views of two blocks of memory."""

    y: Tensor  # [T, C, n], [x1, x2 exp(s) + a_t]
    x2: Tensor  # [T, C2, n]
    sigmoid: Tensor  # [T, C2, n], of twice the pre-activation: s = clamp (2 sigmoid - 1)
    scale: Tensor  # [T, C2, n], exp(s)
    hidden: Tensor  # [T, n, H], after the ReLU, of the operands' type

    @staticmethod
    def elements_per_row(spec: FlowSpec) -> int:
        """Return the number of elements of all but `hidden`."""
        return spec.channels + 3 * spec.active_channels

    @staticmethod
    def of(state: Tensor, hidden: Tensor, chunk: Chunk, spec: FlowSpec) -> list[Saved]:
        """Return the views of every layer; chunk after chunk and layer after layer lie side by side in both blocks."""
        rows, c2, layers = chunk.stop - chunk.start, spec.active_channels, spec.coupling_layers

        def by_layer(block: Tensor, per_row: int) -> Sequence[Tensor]:
            start = chunk.start * per_row * layers
            return block[start : start + rows * per_row * layers].split(rows * per_row)

        found = []
        states = by_layer(state, Saved.elements_per_row(spec))
        for part, own in zip(states, by_layer(hidden, spec.hidden_channels), strict=True):
            pieces = part.split([rows * height for height in (spec.channels, c2, c2, c2)])
            y, x2, sigmoid, scale = (piece.view(chunk.tiles, -1, chunk.tile_rows) for piece in pieces)
            found.append(Saved(y, x2, sigmoid, scale, own.view(chunk.tiles, -1, spec.hidden_channels)))
        return found


class FlowFunction(torch.autograd.Function):
    """lp, log_det and z of all rows, with gradients of x, of a dense condition and of every weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, C]
        dense: Tensor | None,  # [N, P]
        positions: PositionalRows | None,
        spec: FlowSpec,
        chunk_rows: int | None,
        operands: torch.dtype,  # of the subnets' products
        *weights: Tensor,  # the tensors of every layer, in the order of CouplingWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, tiles = len(x), _tiles(spec, x)
        folded = fold_flow(unflatten(weights), spec, positions, x.dtype).layers
        if operands != x.dtype:
            folded = [with_operands(layer, operands) for layer in folded]
            dense = None if dense is None else dense.to(operands)
        bias = DenseBias(dense) if positions is None else GatheredBias(positions, rows, x.device)
        log_g = torch.stack([layer.log_g for layer in folded]).sum()
        z, lp, log_det = torch.empty_like(x), x.new_empty(rows), x.new_empty(rows)
        chunks = list(bias.chunks(rows, chunk_rows or tiles * TILE_ROWS, tiles))
        state = Block(rows * spec.coupling_layers * Saved.elements_per_row(spec), x)
        hidden = Block(rows * spec.coupling_layers * spec.hidden_channels, x, operands)
        for chunk in chunks:
            here = slice(chunk.start, chunk.stop)
            layers = Saved.of(state.tensor, hidden.tensor, chunk, spec)
            latent = x.new_empty(layers[0].y.shape)
            states = [*(saved.y for saved in layers), latent]
            states[0].transpose(1, 2).copy_(x[here].view(chunk.tiles, -1, spec.channels))
            for layer, saved, following in zip(folded, layers, states[1:], strict=True):
                bias.fill(layer, chunk, saved.hidden)
                carry_saving(layer, saved, following, spec)
            sigmoid_sum = torch.stack([saved.sigmoid.sum(dim=1).view(-1) for saved in layers]).sum(dim=0)
            # sum(s) over all layers, with s = clamp (2 sigmoid - 1)
            scale_sum = sigmoid_sum.mul_(2 * spec.clamp).sub_(spec.clamp * spec.active_channels * len(folded))
            z[here], log_det[here] = latent.transpose(1, 2).reshape(-1, spec.channels), scale_sum.add_(log_g)
            lp[here] = portable_log_likelihood(z[here], log_det[here])
        ctx.save_for_backward(z, state.tensor, hidden.tensor, *weights)
        ctx.blocks = state, hidden  # whose memory is used again once this step's graph is gone
        ctx.spec, ctx.bias, ctx.chunks, ctx.positions, ctx.folded = spec, bias, chunks, positions, folded
        ctx.set_materialize_grads(False)
        return lp, log_det, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_lp: Tensor | None, d_log_det: Tensor | None, d_z: Tensor | None) -> tuple[Any, ...]:
        spec: FlowSpec = ctx.spec
        folded: list[Folded] = ctx.folded
        z, state, hidden, *weights = ctx.saved_tensors
        d_x = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        d_dense = hidden.new_zeros(len(z), spec.condition_channels) if ctx.needs_input_grad[1] else None
        d_det = z.new_zeros(len(z)) if d_log_det is None else d_log_det.clone()
        if d_lp is not None:
            d_det.add_(d_lp, alpha=1 / z.shape[1])

        gradients = Gradients(folded, spec, tiles=ctx.chunks[0].tiles if ctx.chunks else 0)
        for chunk in ctx.chunks:
            here = slice(chunk.start, chunk.stop)
            scratch = Scratch.of(chunk, spec, z, hidden.dtype)
            d_out = torch.zeros_like(scratch.dy)
            d_latent = d_out.transpose(1, 2)  # [T, n, C]
            if d_z is not None:
                d_latent.copy_(d_z[here].view(d_latent.shape))
            if d_lp is not None:  # lp = (const - 1/2 |z|^2 + log_det) / C
                share = d_lp[here].view(chunk.tiles, -1, 1)
                d_latent.addcmul_(z[here].view(d_latent.shape), share, value=-1 / spec.channels)
            d_scale = d_det[here].view(chunk.tiles, 1, -1)
            segments = ctx.bias.segments(chunk) if isinstance(ctx.bias, GatheredBias) else None
            saved, beta = Saved.of(state, hidden, chunk, spec), int(chunk.start > 0)
            for index in reversed(range(len(folded))):
                dx = gradients.accumulate(index, d_out, d_scale, saved[index], scratch, beta)
                gradients.accumulate_bias(index, chunk, ctx.bias, segments, scratch)
                scratch, d_out = scratch._replace(dy=d_out), dx
                w1p = folded[index].w1p
                if d_dense is not None and w1p is not None:
                    d_dense[here].addmm_(scratch.d_hidden.view(-1, spec.hidden_channels), w1p.T)
            if d_x is not None:
                d_x[here] = d_out.transpose(1, 2).reshape(-1, spec.channels)
        if d_dense is not None:
            d_dense = d_dense.to(z.dtype)
        return d_x, d_dense, None, None, None, None, *gradients.unfold(unflatten(weights), d_det.sum(), ctx.positions)


def _tiles(spec: FlowSpec, x: Tensor) -> int:
    """Return the number of tiles that is quickest: 8 up to some 300 channels, 2 at 512, 1 beyond 700."""
    tiles = min(most_tiles(x.device), MOST_TILES)
    one = x.element_size() * spec.hidden_channels * (spec.passive_channels + 2 * spec.active_channels)
    while tiles > 1 and tiles * one > MOST_SUM_BYTES:
        tiles //= 2
    return tiles


def with_operands(layer: Folded, operands: torch.dtype) -> Folded:
    """Return the layer with the operands of its subnet in another type; sums of tables are rounded when used."""
    names = ("w1x", "bias", "w1p", "w2")
    return layer._replace(**{n: t.to(operands) for n in names if (t := getattr(layer, n)) is not None})


def carry_saving(
    layer: Folded,
    saved: Saved,  # holds the layer's input in y and the hidden bias in hidden; filled here
    following: Tensor,  # [T, C, n], filled with the next layer's input
    spec: FlowSpec,
) -> None:
    """Apply one coupling layer of a training step."""
    c1, c2, tiles = spec.passive_channels, spec.active_channels, len(following)
    passive = saved.y[:, :c1].to(saved.hidden.dtype)
    saved.hidden.baddbmm_(passive.transpose(1, 2), layer.w1x.expand(tiles, -1, -1)).relu_()
    a = torch.bmm(layer.w2.expand(tiles, -1, -1), saved.hidden.transpose(1, 2)).to(saved.y.dtype).add_(layer.b2)
    torch.sigmoid(a[:, :c2], out=saved.sigmoid)
    torch.mul(saved.sigmoid, 2 * spec.clamp, out=saved.scale).sub_(spec.clamp).exp_()
    active = saved.y[:, c1:]
    saved.x2.copy_(active)
    torch.addcmul(a[:, c2:], saved.x2, saved.scale, out=active)  # y = [x1, x2 exp(s) + a_t], in place
    layer.permute(saved.y, out=following)


class Scratch(NamedTuple):
    """Gradients of one chunk of T tiles of n rows within one layer, used by all layers."""

    dy: Tensor  # [T, C, n]
    product: Tensor  # [T, C, n]
    da: Tensor  # [T, 2 * C2, n]
    d_hidden: Tensor  # [T, n, H], the gradient before the ReLU, of the operands' type
    block: Block  # whose memory d_hidden is

    @staticmethod
    def of(chunk: Chunk, spec: FlowSpec, like: Tensor, operands: torch.dtype) -> Scratch:
        tiles, rows = chunk.tiles, chunk.tile_rows
        dy, product = like.new_empty(2, tiles, spec.channels, rows).unbind()
        block = Block(tiles * rows * spec.hidden_channels, like, operands)
        d_hidden = block.view(tiles, rows, spec.hidden_channels)
        return Scratch(dy, product, like.new_empty(tiles, 2 * spec.active_channels, rows), d_hidden, block)


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """Set total = beta * total + a b, batched; the sum is of total's type also where the operands are narrower."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b, beta=beta)
    elif beta:
        total += torch.bmm(a, b)
    else:
        total.copy_(torch.bmm(a, b))


class Gradients:
    """Gradients of the folded weights of all layers, summed over chunks, then those of the layers' own tensors."""

    def __init__(self, folded: Sequence[Folded], spec: FlowSpec, tiles: int) -> None:
        first, layers, c = folded[0], len(folded), spec.channels  # b2 is of the type of the sums
        self.spec, self.folded = spec, folded
        new, empty = first.b2.new_zeros, first.b2.new_empty
        # one sum per layer and tile; the first chunk has most tiles and overwrites what was there
        self.w1x = empty(layers, tiles, *first.w1x.shape)  # [.., .., C1, H]
        self.w2 = empty(layers, tiles, *first.w2.shape)  # [.., .., 2 * C2, H]
        # one sum per layer
        self.b2 = new(layers, len(first.b2))
        self.y_sum, self.y_dot = new(layers, c), new(layers, c)  # sums over rows of dy and of dy * y
        self.bias = new(layers, len(first.bias))
        self.tables = new(layers, *first.tables.shape) if first.tables is not None else None
        self.w1p = new(layers, *first.w1p.shape) if first.w1p is not None else None  # [.., P, H]

    def accumulate(
        self,
        index: int,  # of the layer
        d_out: Tensor,  # [T, C, n]
        d_scale: Tensor,  # [T, 1, n], gradient of log_det
        saved: Saved,
        scratch: Scratch,
        beta: int,  # 0 for the first chunk, 1 after it
    ) -> Tensor:
        """Add one chunk's gradients of one layer; return dx [T, C, n], which lies in the scratch."""
        c1, c2, tiles = self.spec.passive_channels, self.spec.active_channels, len(d_out)
        layer, (dy, product, da, d_hidden, _) = self.folded[index], scratch
        layer.permute_back(d_out, out=dy)  # out = W_perm (g y + offset)
        self.y_sum[index] += dy.sum(dim=(0, 2))
        self.y_dot[index] += torch.mul(dy, saved.y, out=product).sum(dim=(0, 2))

        # y2 = x2 exp(s) + a_t and s = clamp (2 sigmoid - 1)
        ds, dy2 = da[:, :c2], dy[:, c1:]
        da[:, c2:] = dy2
        dx2 = dy2.mul_(saved.scale)
        torch.addcmul(d_scale, dx2, saved.x2, out=ds)
        torch.ops.aten.sigmoid_backward.grad_input(ds, saved.sigmoid, grad_input=ds).mul_(2 * self.spec.clamp)
        self.b2[index] += da.sum(dim=(0, 2))
        da = da.to(d_hidden.dtype)
        _add_product(self.w2[index, :tiles], da, saved.hidden, beta)

        torch.bmm(da.transpose(1, 2), layer.w2.expand(tiles, -1, -1), out=d_hidden)
        torch.ops.aten.threshold_backward.grad_input(d_hidden, saved.hidden, 0, grad_input=d_hidden)
        _add_product(self.w1x[index, :tiles], saved.y[:, :c1].to(d_hidden.dtype), d_hidden, beta)
        dy[:, :c1] += torch.bmm(layer.w1x.expand(tiles, -1, -1), d_hidden.transpose(1, 2))
        return dy

    def accumulate_bias(
        self, index: int, chunk: Chunk, bias: Bias, segments: tuple[Tensor, Tensor] | None, scratch: Scratch
    ) -> None:
        """Add one chunk's gradients of one layer's hidden bias, which `accumulate` has left in the scratch."""
        d_hidden = scratch.d_hidden.view(-1, scratch.d_hidden.shape[2])  # [T * n, H]
        if isinstance(bias, GatheredBias):
            assert segments is not None
            assert self.tables is not None
            self.tables[index] += bias.sum_segments(d_hidden, segments)  # each sum is rounded once
            return
        self.bias[index] += d_hidden.sum(dim=0, dtype=self.bias.dtype)
        if isinstance(bias, DenseBias) and bias.condition is not None and self.w1p is not None:
            self.w1p[index] += bias.condition[chunk.start : chunk.stop].T @ d_hidden

    def unfold(
        self,
        layers: Sequence[CouplingWeights],
        d_log_det: Tensor,  # scalar, sum over rows of the gradient of log_det
        positions: PositionalRows | None,
    ) -> list[Tensor | None]:
        """Return the gradients of every layer's `CouplingWeights`, in their order; W_perm is fixed and gets None."""
        global_scale = torch.stack([layer.global_scale for layer in layers]).to(self.b2.dtype)
        g, dg_dp = global_affine_scale(global_scale, self.spec.global_affine)
        scale = subnet_scale(self.spec, self.b2)
        d_bias, d_w1 = self.bias, self.w1x.sum(dim=1).transpose(1, 2)
        if self.tables is not None and positions is not None:
            # A = code_w W1w^T + b1 and B = code_h W1h^T
            column_code, row_code = positions.codes(self.b2.dtype, self.b2.device)
            d_columns, d_lines = self.tables.split([positions.width, positions.height], dim=1)
            products = d_columns.transpose(1, 2) @ column_code, d_lines.transpose(1, 2) @ row_code
            d_w1 = torch.cat([d_w1, *products], dim=2)
            d_bias = d_columns.sum(dim=1)
        elif self.w1p is not None:
            d_w1 = torch.cat([d_w1, self.w1p.transpose(1, 2)], dim=2)
        # v = g y + offset and dv = dy / g, so dg = sum(dv y) and doffset = sum(dv); log_det adds sum(log g) per row
        d_scale = (self.y_dot + d_log_det) / g * dg_dp
        stacked = (
            d_w1.contiguous(),
            d_bias,
            scale[:, None] * self.w2.sum(dim=1),
            scale * self.b2,
            d_scale,
            self.y_sum / g,
        )
        found: list[Tensor | None] = []
        for layer, *gradients in zip(layers, *stacked, strict=True):
            found += [gradient.to(p.dtype) for gradient, p in zip(gradients, layer, strict=False)] + [None]
        return found
