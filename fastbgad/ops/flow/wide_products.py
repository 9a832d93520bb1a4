"""The arithmetic of the wide flow: one chunk of rows through all layers, and its gradients back.

Products are the library's and everything between them is a coupling kernel's; the equations are in wide.py.
"operand" below is the type that products read, float16 or float32.

A row is lost where something does not fit the operands, or is NaN. Its log_det is NaN from there on; rows do not mix in
a product with weights, so the others do not notice. Sums over rows, which the gradients are, would: for them a lost row
has zeros in its saved activations (`Saved.clear`), and zeros for a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...flow_spec import CouplingWeights, FlowSpec
from ..positional import PositionalRows
from .folded import global_affine_scale


def operand_type(matmul_precision: str) -> torch.dtype:
    """Return the type of the operands of products."""
    return torch.float16 if matmul_precision == "float16" else torch.float32


class StackedWeights(NamedTuple):
    """Weights of all layers, stacked."""

    w1: Tensor  # [L, H, C1 + P] operand
    b1: Tensor  # [L, H] operand
    w2: Tensor  # [L, 2 * C2, H] operand
    b2: Tensor  # [L, 2 * C2]
    g: Tensor  # [L, C]
    dg_dp: Tensor  # [L, C], derivative of g with respect to its parameter
    offset: Tensor  # [L, C]
    w_perm: Tensor  # [L, C, C] float32, or [L, C, 3 * C] = [W_high | W_high | W_low]; empty for a hard permutation
    to: Tensor | None  # [L, C], hard permutation: where each channel of v goes
    log_g: Tensor  # scalar, sum of log g over channels and layers; NaN where a weight does not fit the operands


def stack_weights(
    weights: Sequence[Tensor], spec: FlowSpec, operand: torch.dtype, *, back: bool = False
) -> StackedWeights:
    """Return all layers' weights; `back`: W_perm as `carry_back` reads it, [L, 3 * C, C] = [W_high; W_high; W_low]."""
    size = len(CouplingWeights._fields)
    w1, b1, w2, b2, global_scale, offset, w_perm = (torch.stack(list(weights[i::size])) for i in range(size))
    g, dg_dp = global_affine_scale(global_scale, spec.global_affine)
    to = None
    if spec.hard_permutation:
        # out[j] = v[c] where W_perm[j, c] = 1
        to, w_perm = w_perm.argmax(dim=1), w_perm.new_empty(0)
    elif operand == torch.float16:
        high = w_perm.half()
        w_perm = torch.cat([high, high, (w_perm - high).half()], dim=1 if back else 2)
    w1, b1, w2 = (tensor.to(operand) for tensor in (w1, b1, w2))
    # An infinite weight does not show in every row: a ReLU hides -inf, and a library's may hide NaN too.
    fit = torch.stack([tensor.abs().amax() for tensor in (w1, b1, w2)]).isfinite().all()
    log_g = torch.where(fit, torch.log(g).sum(), math.nan)
    return StackedWeights(w1, b1, w2, b2, g, dg_dp, offset, w_perm, to, log_g)


class Gradients(NamedTuple):
    """Parameter gradients of all layers, summed over chunks, float32."""

    w1: Tensor  # [L, H, C1 + P]
    b1: Tensor  # [L, H]
    w2: Tensor  # [L, 2 * C2, H]
    b2: Tensor  # [L, 2 * C2]
    g: Tensor  # [L, C]
    offset: Tensor  # [L, C]

    @classmethod
    def zeros(cls, stacked: StackedWeights) -> Gradients:
        like = (stacked.w1, stacked.b1, stacked.w2, stacked.b2, stacked.g, stacked.offset)
        return cls(*(torch.zeros(tensor.shape, device=tensor.device) for tensor in like))


class Saved(NamedTuple):
    """Activations that the layers write: into memory of their own if a backward follows, else into the same."""

    states: Tensor  # [.., n, C] float32, the output of every layer but the last
    a: Tensor  # [.., n, 2 * C2] operand
    hidden: Tensor  # [.., n, H] operand

    @classmethod
    def empty(cls, stacked: StackedWeights, rows: int, layers: int | None) -> Saved:
        """Return memory for this many layers; None: as little as layers can share."""
        # A hard permutation moves channels straight from one state into the next.
        states = (1 if stacked.to is None else 2) if layers is None else layers - 1
        layers = layers or 1
        w2 = stacked.w2
        return cls(
            torch.empty(states, rows, stacked.g.shape[1], device=w2.device),
            torch.empty(layers, rows, w2.shape[1], dtype=w2.dtype, device=w2.device),
            torch.empty(layers, rows, w2.shape[2], dtype=w2.dtype, device=w2.device),
        )

    def state(self, layer: int, rows: int) -> Tensor:
        """Return the first rows of one layer's output."""
        return self.states[layer % len(self.states)][:rows]

    def subnet(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return the first rows of one layer's a and hidden."""
        return self.a[layer % len(self.a)][:rows], self.hidden[layer % len(self.hidden)][:rows]

    def clear(self, lost: Tensor) -> None:
        """Write zeros for the rows that are lost, bool [n]."""
        from ...kernels.coupling.operands import coupling_clear

        for tensor in self:
            coupling_clear(tensor[:, : len(lost)], lost)


class Chunk(NamedTuple):
    """Rows that go through the layers together."""

    x: Tensor  # [n, C], zero where a value cannot be used
    u: Tensor  # [n, C1 + P], [x1 | p]; each layer fills in its x1
    lost: Tensor  # [n] bool


class Upstream(NamedTuple):
    """Upstream gradients of rows."""

    pull: Tensor  # [n], of -|z|^2 / 2, scaled
    d_log_det: Tensor  # [n], scaled
    d_z: Tensor | None  # [n, C]

    def part(self, here: slice, scale: Tensor) -> Upstream:
        """Return those of some of the rows, with d_z scaled."""
        d_z = None if self.d_z is None else self.d_z[here].contiguous() * scale
        return Upstream(self.pull[here], self.d_log_det[here], d_z)


class Condition(NamedTuple):
    """The condition of all rows: dense, or positions on a map (in raster order without an index), or none."""

    dense: Tensor | None  # [N, P]
    position: Tensor | None  # [N] int64
    height: int  # 0 without positions
    width: int

    def enter(self, x: Tensor, inputs: int, here: slice, dtype: torch.dtype) -> Chunk:
        """Return a chunk of rows with their condition.

        Lost are rows with a NaN, with features or a condition that do not fit `dtype`, or with a position outside the
        map. Values that do not fit are replaced by zeros.
        """
        from ...kernels.coupling.operands import coupling_operand, coupling_rows

        c1, largest = x.shape[1] - x.shape[1] // 2, torch.finfo(dtype).max
        clean, lost = coupling_rows(x[here], largest)
        u = torch.empty(here.stop - here.start, inputs, dtype=dtype, device=x.device)
        if self.dense is not None:
            p, unusable = coupling_rows(self.dense[here], largest)
            lost |= unusable
            coupling_operand(p, u[:, c1:])
        elif self.height:
            area, middle = self.height * self.width, c1 + (inputs - c1) // 2
            positions = PositionalRows(self.height, self.width, channels=inputs - c1)
            columns, lines = positions.codes(dtype, x.device)
            if self.position is None:
                position = torch.arange(here.start, here.stop, device=x.device) % area
            else:
                position = self.position[here] % area
                lost |= position != self.position[here]
            u[:, c1:middle] = columns[position % self.width]
            u[:, middle:] = lines[position // self.width]
        return Chunk(clean, u, lost)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Set out = a b. Products of 16-bit operands are summed in float32, whatever the type of `out`."""
    if a.dtype == torch.float32 or (a.is_cuda and out.dtype == a.dtype):
        return torch.mm(a, b, out=out)
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    # A CPU, or PyTorch before 2.8, which has no float32 result of 16-bit operands.
    return out.copy_(a.float() @ b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to total, in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total.add_(product(a, b, torch.empty(total.shape, device=total.device)))


def hidden_units(u: Tensor, w1: Tensor, b1: Tensor, out: Tensor) -> None:
    """Set out = relu(u W1^T + b1)."""
    if u.dtype == torch.float16 and not u.is_cuda:
        out.copy_(torch.addmm(b1.float(), u.float(), w1.float().T).relu_())
    else:
        torch.ops.aten._addmm_activation.out(b1, u, w1.T, out=out)


def _coupling(stacked: StackedWeights, layer: int, spec: FlowSpec) -> Any:
    from ...kernels.coupling.forward import Coupling

    to = None if stacked.to is None else stacked.to[layer]
    scaled_tanh = spec.clamp_form == "scaled_tanh"
    return Coupling(stacked.b2[layer], stacked.g[layer], stacked.offset[layer], to, spec.clamp, scaled_tanh)


def carry(
    chunk: Chunk,
    stacked: StackedWeights,
    spec: FlowSpec,
    saved: Saved,  # filled in
    z: Tensor | None,  # [n, C], filled in
) -> tuple[Tensor, Tensor]:
    """Carry a chunk of rows through all layers; return log_det [n], NaN for rows that are lost, and |z|^2 [n]."""
    from ...kernels.coupling.forward import coupling_forward
    from ...kernels.coupling.operands import coupling_operand

    (state, u, lost), rows, c1 = chunk, len(chunk.x), spec.passive_channels
    log_det = square = torch.where(lost, math.nan, stacked.log_g)
    for layer in range(spec.coupling_layers):
        last = layer == spec.coupling_layers - 1
        a, hidden = saved.subnet(layer, rows)
        coupling_operand(state[:, :c1], u[:, :c1])
        hidden_units(u, stacked.w1[layer], stacked.b1[layer], hidden)
        product(hidden, stacked.w2[layer].T, a)
        # The last permutation is a rotation: it does not change |z|.
        following = z if last else saved.state(layer, rows)
        v, log_det, square = coupling_forward(
            state,
            a,
            _coupling(stacked, layer, spec),
            log_det,
            want_v=following is not None,
            want_square=last,
            out=following if spec.hard_permutation else None,
        )
        if following is not None:
            state = v if spec.hard_permutation else product(v, stacked.w_perm[layer].T, following)
    return log_det, square


def carry_back(
    chunk: Chunk,
    stacked: StackedWeights,
    spec: FlowSpec,
    saved: Saved,
    upstream: Upstream,
    gradients: Gradients,  # added to
    d_dense: Tensor | None,  # [n, P], added to
    need_x: bool,
) -> Tensor | None:
    """Add one chunk's gradients; return dx [n, C] if needed."""
    from ...kernels.coupling.backward import coupling_backward
    from ...kernels.coupling.operands import coupling_operand

    (x, u, _), rows, c1 = chunk, len(chunk.x), spec.passive_channels
    pull: Tensor | None = upstream.pull
    d_out = upstream.d_z
    for layer in reversed(range(spec.coupling_layers)):
        dv = d_out
        if d_out is not None and not spec.hard_permutation:
            operand = d_out
            if u.dtype == torch.float16:
                operand = torch.empty(rows, 3 * spec.channels, dtype=u.dtype, device=u.device)
                coupling_operand(d_out, operand, three=True)
            dv = product(operand, stacked.w_perm[layer], torch.empty_like(x))
        state = saved.state(layer - 1, rows) if layer else x
        a, hidden = saved.subnet(layer, rows)
        dx, da, d_offset, d_g, d_b2 = coupling_backward(
            state, a, _coupling(stacked, layer, spec), dv, pull, upstream.d_log_det
        )
        # |z|^2 = |v|^2 of the last layer, so its gradient enters there, without a permutation.
        pull = None
        d_hidden = product(da, stacked.w2[layer], torch.empty_like(hidden))
        torch.ops.aten.threshold_backward.grad_input(d_hidden, hidden, 0, grad_input=d_hidden)
        coupling_operand(state[:, :c1], u[:, :c1])
        add_product(gradients.w1[layer], d_hidden.T, u)
        gradients.b1[layer] += d_hidden.sum(dim=0, dtype=torch.float32)
        add_product(gradients.w2[layer], da.T, hidden)
        gradients.b2[layer] += d_b2
        gradients.g[layer] += d_g
        gradients.offset[layer] += d_offset
        if d_dense is not None:
            add_product(d_dense, d_hidden, stacked.w1[layer][:, c1:])
        if layer or need_x:
            add_product(dx[:, :c1], d_hidden, stacked.w1[layer][:, :c1])
        d_out = dx
    return d_out if need_x else None
