"""The wide flow, more channels than stay on the chip: a library's matrix products around the fused coupling kernels.

Per layer and chunk of n rows, with u = [x1 | p] and p the condition:

    hidden = relu(u W1^T + b1)                      library, bias and ReLU in its epilogue    [n, H]
    a = hidden W2^T                                 library                                   [n, 2 * C2]
    v = g [x1, x2 exp(s) + a_t] + offset            fastbgad/kernels/coupling.py, one pass    [n, C]
    x = v W_perm^T                                  library; the kernel moves channels for a hard permutation

The positions' codes are gathered once per chunk and take part in the first product. At these widths its P extra columns
should cost less than reading and writing all hidden activations once more to add two table rows, and the gradient of W1
comes from one product too, without sums in an order of their own.

precision "float16": products of 16-bit operands summed in float32, state and log-determinant in float32. The
permutation would dominate the error, so v and W_perm are split into a high and a low part:
[v_high | v_low | v_high] [W_high; W_high; W_low], one product of depth 3 C. What the kernels cast is clamped to
+-65504. What the library casts, hidden and a, becomes infinite beyond that and its row's lp NaN or -inf. (The library
may add up parts of hidden and a in float16 unless
`torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction` is switched off.)
precision "float32": float32 products. These are the library's, so torch's own switch decides about TF32
(`torch.set_float32_matmul_precision`; off unless switched on).

A row with a NaN, or whose features do not fit the operands, or whose place is outside its map, has lp, log_det and z
NaN. It touches no other row, and the backward leaves it out.

Training keeps 4 C + 4 C2 + 2 H bytes per row and layer in float16 (4.6 KB at C = 512, 16.9 KB at C = 2048, both with
P = 128; 4 C + 8 C2 + 4 H in float32), or nothing, and its backward then runs each chunk forward again.

Equations: fastbgad/reference/flow.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from ..errors import BackendError, ConfigError
from ..flow_spec import ClampForm, CouplingWeights, FlowSpec, GlobalAffine
from . import flow_torch
from .dispatch import Precision, interpreting
from .flow_tables import global_affine_scale
from .positional import PositionalRows

# Rows that go through the layers together: enough to fill a GPU, with 0.7 GB of scratch at C = 2048. Not yet measured.
CHUNK_ROWS = 16384
# Training keeps what its backward reads up to this many bytes; above, the backward runs each chunk forward again.
LARGEST_KEPT = 8 << 30
LOG_2PI = math.log(2 * math.pi)
NO_TRAINING = 'the wide flow trains on CUDA tensors; on a CPU use impl="torch"'


def forward(
    x: Tensor,  # [N, C]
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: PositionalRows | Tensor | None,  # or [N, P]
    return_z: bool,
    precision: str,
    *,
    chunk_rows: int = CHUNK_ROWS,
    recompute: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """lp [N], log_det [N] and z [N, C] if asked, float32; differentiable in x, a dense condition and all but W_perm.

    Args:
        x: features of any type up to float32, computed in float32.
        condition: positions, a dense [N, P] tensor, or None.
        precision: "float16" or "float32", see above.
        chunk_rows: rows that go through the layers together where nothing is kept.
        recompute: keep nothing for the backward; None: if it would be more than `LARGEST_KEPT` bytes.

    Raises:
        ConfigError: an unknown precision.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(get_args(Precision))}")
    positions = condition if isinstance(condition, PositionalRows) else None
    dense = condition.float().contiguous() if isinstance(condition, Tensor) else None
    index = None if positions is None or positions.index is None else positions.index.to(x.device)
    height, width = (0, 0) if positions is None else (positions.height, positions.width)
    x = x.float().contiguous()
    weights = [tensor.float() for layer in layers for tensor in layer]
    differentiable = (x, *weights) if dense is None else (x, dense, *weights)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    if keep:
        size = 2 if precision == "float16" else 4
        per_row = 4 * spec.channels + size * (2 * spec.active_channels + weights[0].shape[0])
        keep = not (x.shape[0] * len(layers) * per_row > LARGEST_KEPT if recompute is None else recompute)
    lp, log_det, z, *_ = flow_wide(
        x, dense, index, weights, height, width, spec.clamp, spec.clamp_form, spec.global_affine,
        spec.hard_permutation, precision, chunk_rows, return_z, keep,
    )  # fmt: skip
    return lp, log_det, z if return_z else None


class _Folded(NamedTuple):
    """All layers' weights stacked; "operand" is the type that products read."""

    w1: Tensor  # [L, H, C1 + P] operand
    b1: Tensor  # [L, H] operand
    w2: Tensor  # [L, 2 * C2, H] operand
    b2: Tensor  # [L, 2 * C2]
    g: Tensor  # [L, C]
    dg_dp: Tensor  # [L, C], derivative of g with respect to its parameter
    offset: Tensor  # [L, C]
    w_perm: Tensor  # [L, C, C] float32, or [L, C, 3 * C] = [W_high | W_high | W_low]; empty for a hard permutation
    to: Tensor | None  # [L, C], hard permutation: where each channel of v goes
    log_g: Tensor  # scalar, sum of log g over channels and layers


class _Gradients(NamedTuple):
    """Parameter gradients of all layers, summed over chunks, float32."""

    w1: Tensor  # [L, H, C1 + P]
    b1: Tensor  # [L, H]
    w2: Tensor  # [L, 2 * C2, H]
    b2: Tensor  # [L, 2 * C2]
    g: Tensor  # [L, C]
    offset: Tensor  # [L, C]


class _Kept(NamedTuple):
    """What the layers write: each its own where a backward follows, else the same place again and again."""

    states: Tensor  # [.., n, C] float32, the output of every layer but the last
    a: Tensor  # [.., n, 2 * C2] operand
    hidden: Tensor  # [.., n, H] operand

    @staticmethod
    def empty(folded: _Folded, rows: int, layers: int | None) -> _Kept:
        """Room for this many layers; None: as little as layers can share."""
        # A hard permutation moves channels straight from one state into the next.
        states = (1 if folded.to is None else 2) if layers is None else layers - 1
        layers = layers or 1
        w2 = folded.w2
        return _Kept(
            torch.empty(states, rows, folded.g.shape[1], device=w2.device),
            torch.empty(layers, rows, w2.shape[1], dtype=w2.dtype, device=w2.device),
            torch.empty(layers, rows, w2.shape[2], dtype=w2.dtype, device=w2.device),
        )

    def state(self, layer: int, rows: int) -> Tensor:
        """The first rows of one layer's output."""
        return self.states[layer % len(self.states)][:rows]

    def subnet(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """The first rows of one layer's a and hidden."""
        return self.a[layer % len(self.a)][:rows], self.hidden[layer % len(self.hidden)][:rows]


class _Condition(NamedTuple):
    """The condition of all rows: dense, or positions on a map (in raster order without an index), or none."""

    dense: Tensor | None  # [N, P]
    place: Tensor | None  # [N] int64
    height: int  # 0 without positions
    width: int

    def enter(self, x: Tensor, inputs: int, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk's x [n, C] and u = [x1 | p] [n, C1 + P], its x1 left for each layer to fill in; the rows lost [n].

        Lost are rows with a NaN, with features that do not fit `dtype`, or with a place outside the map. They are
        computed as zeros, whose gradient reaches no weight, and get their NaN at the end.
        """
        from ..kernels.coupling import coupling_operand, coupling_rows

        c1 = x.shape[1] - x.shape[1] // 2
        clean, lost = coupling_rows(x[start:stop], torch.finfo(dtype).max)
        u = torch.empty(stop - start, inputs, dtype=dtype, device=x.device)
        if self.dense is not None:
            lost |= ~self.dense[start:stop].isfinite().all(dim=1)
            coupling_operand(self.dense[start:stop], u[:, c1:])
            u[:, c1:].masked_fill_(lost[:, None], 0)
        elif self.height:
            area, middle = self.height * self.width, c1 + (inputs - c1) // 2
            positions = PositionalRows(self.height, self.width, channels=inputs - c1)
            columns, lines = (code.to(dtype) for code in positions.codes(torch.float32, x.device))
            if self.place is None:
                place = torch.arange(start, stop, device=x.device) % area
            else:
                place = self.place[start:stop] % area
                lost |= place != self.place[start:stop]
            u[:, c1:middle] = columns[place % self.width]
            u[:, middle:] = lines[place // self.width]
        return clean, u, lost


def _fold(weights: Sequence[Tensor], spec: FlowSpec, precision: str, *, back: bool = False) -> _Folded:
    """`back`: W_perm as the way back reads it, [L, 3 * C, C] = [W_high; W_high; W_low]."""
    operand = torch.float16 if precision == "float16" else torch.float32
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
    if operand == torch.float16:
        w1, b1, w2 = (tensor.clamp(-65504, 65504).half() for tensor in (w1, b1, w2))
    return _Folded(w1, b1, w2, b2, g, dg_dp, offset, w_perm, to, torch.log(g).sum())


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b. Products of 16-bit operands are summed in float32, whatever the type of `out`."""
    if a.dtype == torch.float32 or (a.is_cuda and out.dtype == a.dtype):
        return torch.mm(a, b, out=out)
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    # A CPU, or PyTorch before 2.8, which has no float32 result of 16-bit operands.
    return out.copy_(a.float() @ b.float())


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total.add_(_product(a, b, torch.empty(total.shape, device=total.device)))


def _hidden_units(u: Tensor, w1: Tensor, b1: Tensor, out: Tensor) -> None:
    """out = relu(u W1^T + b1)."""
    if u.dtype == torch.float16 and not u.is_cuda:
        out.copy_(torch.addmm(b1.float(), u.float(), w1.float().T).relu_())
    else:
        torch.ops.aten._addmm_activation.out(b1, u, w1.T, out=out)


def _coupling(folded: _Folded, layer: int, spec: FlowSpec) -> Any:
    from ..kernels.coupling import Coupling

    to = None if folded.to is None else folded.to[layer]
    scaled_tanh = spec.clamp_form == "scaled_tanh"
    return Coupling(folded.b2[layer], folded.g[layer], folded.offset[layer], to, spec.clamp, scaled_tanh)


def _carry(
    x: Tensor,  # [n, C]
    u: Tensor,  # [n, C1 + P], p filled in
    folded: _Folded,
    spec: FlowSpec,
    kept: _Kept,
    z: Tensor | None,  # [n, C], filled in
) -> tuple[Tensor, Tensor]:
    """One chunk of rows through all layers: log_det [n] and |z|^2 [n]."""
    from ..kernels.coupling import ABSENT, MOVED, PLAIN, SPLIT, coupling_forward, coupling_operand

    rows, c1, state = len(x), spec.passive_channels, x
    hard = folded.to is not None
    log_det = square = folded.log_g.repeat(rows)
    for layer in range(spec.coupling_layers):
        last = layer == spec.coupling_layers - 1
        a, hidden = kept.subnet(layer, rows)
        coupling_operand(state[:, :c1], u[:, :c1])
        _hidden_units(u, folded.w1[layer], folded.b1[layer], hidden)
        _product(hidden, folded.w2[layer].T, a)
        # The last permutation is a rotation: it does not change |z|.
        following = z if last else kept.state(layer, rows)
        form = MOVED if hard else SPLIT if u.dtype == torch.float16 else PLAIN
        v, log_det, square = coupling_forward(
            state, a, _coupling(folded, layer, spec), log_det, form=(ABSENT if following is None else form).value,
            want_square=last, out=following if hard else None,
        )  # fmt: skip
        if following is not None:
            state = following if hard else _product(v, folded.w_perm[layer].T, following)
    return log_det, square


def _carry_back(
    x: Tensor,  # [n, C]
    u: Tensor,  # [n, C1 + P], p filled in
    folded: _Folded,
    spec: FlowSpec,
    kept: _Kept,
    pull: Tensor | None,  # [n], gradient of -|z|^2 / 2
    d_log_det: Tensor,  # [n]
    d_z: Tensor | None,  # [n, C]
    gradients: _Gradients,
    d_dense: Tensor | None,  # [n, P], added to
    need_x: bool,
) -> Tensor | None:
    """Adds one chunk's gradients; returns dx [n, C] if needed."""
    from ..kernels.coupling import ABSENT, MOVED, PLAIN, coupling_backward, coupling_operand

    rows, c1, d_out = len(x), spec.passive_channels, d_z
    for layer in reversed(range(spec.coupling_layers)):
        dv, form = d_out, MOVED
        if d_out is None:
            form = ABSENT
        elif folded.to is None:
            dv, form, operand = torch.empty_like(x), PLAIN, d_out
            if u.dtype == torch.float16:
                operand = torch.empty(rows, 3 * spec.channels, dtype=u.dtype, device=u.device)
                coupling_operand(d_out, operand, three=True)
            _product(operand, folded.w_perm[layer], dv)
        state = kept.state(layer - 1, rows) if layer else x
        a, hidden = kept.subnet(layer, rows)
        dx, da, d_offset, d_g, d_b2 = coupling_backward(
            state, a, _coupling(folded, layer, spec), dv, pull, d_log_det, form=form.value
        )
        # |z|^2 = |v|^2 of the last layer, so its gradient enters there, without a permutation.
        pull = None
        d_hidden = _product(da, folded.w2[layer], torch.empty_like(hidden))
        torch.ops.aten.threshold_backward.grad_input(d_hidden, hidden, 0, grad_input=d_hidden)
        coupling_operand(state[:, :c1], u[:, :c1])
        _add_product(gradients.w1[layer], d_hidden.T, u)
        gradients.b1[layer] += d_hidden.sum(dim=0, dtype=torch.float32)
        _add_product(gradients.w2[layer], da.T, hidden)
        gradients.b2[layer] += d_b2
        gradients.g[layer] += d_g
        gradients.offset[layer] += d_offset
        if d_dense is not None:
            _add_product(d_dense, d_hidden, folded.w1[layer][:, c1:])
        if layer or need_x:
            _add_product(dx[:, :c1], d_hidden, folded.w1[layer][:, :c1])
        d_out = dx
    return d_out if need_x else None


def _gradient_scale(upstream: Sequence[Tensor]) -> Tensor:
    """S = 2^k, a scalar, that brings the largest of the upstream gradients into [1/2, 1); 1 if all are zero.

    In 16 bits gradients would vanish where a loss is a mean over many rows. A power of two changes no digit.
    """
    if not upstream[0].numel():
        return torch.ones((), device=upstream[0].device)
    largest = torch.stack([tensor.abs().amax() for tensor in upstream]).amax()
    exponent = (127 - torch.frexp(largest).exponent).clamp(1, 254)
    scale = (exponent << 23).view(torch.float32)
    return torch.where((largest > 0) & largest.isfinite(), scale, 1.0)


def _spec(weights: Sequence[Tensor], clamp: float, form: str, affine: str, hard: bool) -> FlowSpec:
    channels = weights[6].shape[0]
    return FlowSpec(
        channels,
        condition_channels=weights[0].shape[1] - (channels - channels // 2),
        coupling_layers=len(weights) // len(CouplingWeights._fields),
        clamp=clamp,
        clamp_form=cast(ClampForm, form),
        global_affine=cast(GlobalAffine, affine),
        hard_permutation=hard,
    )


def _flow_wide(
    x: Tensor,  # [N, C] float32, like all that follow
    dense: Tensor | None,  # [N, P]
    index: Tensor | None,  # [N] int64
    weights: list[Tensor],  # of every layer, in the order of CouplingWeights
    height: int,  # of the map; 0 without positions
    width: int,
    clamp: float,
    clamp_form: str,
    global_affine: str,
    hard_permutation: bool,
    precision: str,
    chunk_rows: int,
    return_z: bool,
    keep: bool,  # what the backward reads; else it runs the chunks forward again
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lp [N], log_det [N], z [N, C] and what is kept: states, a, hidden. What is not asked for is empty."""
    spec = _spec(weights, clamp, clamp_form, global_affine, hard_permutation)
    rows = len(x)
    with torch.autocast(x.device.type, enabled=False):
        folded = _fold(weights, spec, precision)
        condition = _Condition(dense, index, height, width)
        step = max(1, rows if keep else min(rows, chunk_rows))
        kept = _Kept.empty(folded, min(step, rows), spec.coupling_layers if keep else None)
        lp, log_det = torch.empty(rows, device=x.device), torch.empty(rows, device=x.device)
        z = torch.empty(rows, spec.channels, device=x.device) if return_z else x.new_empty(0)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            clean, u, lost = condition.enter(x, folded.w1.shape[2], start, stop, folded.w1.dtype)
            chunk_z = z[start:stop] if return_z else None
            chunk_det, square = _carry(clean, u, folded, spec, kept, chunk_z)
            chunk_det.masked_fill_(lost, math.nan)
            if chunk_z is not None:
                chunk_z.masked_fill_(lost[:, None], math.nan)
            # lp = (-C/2 ln(2 pi) - 1/2 |z|^2 + log_det) / C
            lp[start:stop] = (chunk_det - 0.5 * square) / spec.channels - 0.5 * LOG_2PI
            log_det[start:stop] = chunk_det
    return (lp, log_det, z, *kept) if keep else (lp, log_det, z, x.new_empty(0), x.new_empty(0), x.new_empty(0))


def _flow_wide_backward(
    d_lp: Tensor | None,  # [N]
    d_log_det: Tensor | None,  # [N]
    d_z: Tensor | None,  # [N, C]
    lp: Tensor,  # [N]
    states: Tensor,  # what the forward kept
    a: Tensor,
    hidden: Tensor,
    x: Tensor,
    dense: Tensor | None,
    index: Tensor | None,
    weights: list[Tensor],
    height: int,
    width: int,
    clamp: float,
    clamp_form: str,
    global_affine: str,
    hard_permutation: bool,
    precision: str,
    chunk_rows: int,
    keep: bool,
    need_x: bool,
    need_dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, of a dense condition, and of all layers' w1, b1, w2, b2, global_scale, global_offset."""
    spec = _spec(weights, clamp, clamp_form, global_affine, hard_permutation)
    rows, layers = len(x), spec.coupling_layers
    with torch.autocast(x.device.type, enabled=False):
        # Rows without a finite lp are left out.
        lost = ~lp.isfinite()
        d_lp, d_log_det = (None if d is None else d.masked_fill(lost, 0) for d in (d_lp, d_log_det))
        d_z = None if d_z is None else d_z.masked_fill(lost[:, None], 0).contiguous()
        # lp = (const - 1/2 |z|^2 + log_det) / C
        per_channel = None if d_lp is None else d_lp / spec.channels
        scale = _gradient_scale([t for t in (per_channel, d_log_det, d_z) if t is not None])
        pull = None if per_channel is None else per_channel * scale
        d_det = x.new_zeros(rows) if pull is None else pull.clone()
        if d_log_det is not None:
            d_det += d_log_det * scale

        folded = _fold(weights, spec, precision, back=True)
        again = None if keep else _fold(weights, spec, precision)
        condition = _Condition(dense, index, height, width)
        step = max(1, rows if keep else min(rows, chunk_rows))
        kept = _Kept(states, a, hidden) if keep else _Kept.empty(folded, min(step, rows), layers)
        like = (folded.w1, folded.b1, folded.w2, folded.b2, folded.g, folded.offset)
        gradients = _Gradients(*(torch.zeros(tensor.shape, device=x.device) for tensor in like))
        d_x = torch.empty_like(x) if need_x else x.new_empty(0)
        d_dense = x.new_zeros(rows, spec.condition_channels) if need_dense else x.new_empty(0)
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            clean, u, _ = condition.enter(x, folded.w1.shape[2], start, here.stop, folded.w1.dtype)
            if again is not None:
                _carry(clean, u, again, spec, kept, None)
            d_chunk = _carry_back(
                clean, u, folded, spec, kept,
                pull=None if pull is None else pull[here],
                d_log_det=d_det[here],
                d_z=None if d_z is None else d_z[here] * scale,
                gradients=gradients,
                d_dense=d_dense[here] if need_dense else None,
                need_x=need_x,
            )  # fmt: skip
            if d_chunk is not None:
                d_x[here] = d_chunk
        # log_det adds sum(log g) per row
        gradients.g.add_(d_det.sum() / folded.g).mul_(folded.dg_dp)
        for gradient in (d_x, d_dense, *gradients):
            gradient.div_(scale)
    return d_x, d_dense, *gradients


flow_wide = torch.library.custom_op("fastbgad::flow_wide", _flow_wide, mutates_args=(), device_types="cuda")
flow_wide_backward = torch.library.custom_op(
    "fastbgad::flow_wide_backward", _flow_wide_backward, mutates_args=(), device_types="cuda"
)


@flow_wide.register_kernel("cpu")
def _flow_wide_on_cpu(
    x: Tensor, dense: Tensor | None, index: Tensor | None, weights: list[Tensor], *options: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same under Triton's interpreter; else inference on the portable path, for traced and exported graphs."""
    if interpreting():
        return _flow_wide(x, dense, index, weights, *options)
    height, width, clamp, clamp_form, global_affine, hard_permutation, _, _, return_z, keep = options
    if keep:
        raise BackendError(NO_TRAINING)
    spec = _spec(weights, clamp, clamp_form, global_affine, hard_permutation)
    positions = PositionalRows(height, width, index, spec.condition_channels) if height else None
    with torch.autocast("cpu", enabled=False):
        layers = flow_torch.unflatten(weights)
        lp, log_det, z = flow_torch.infer(x, layers, spec, positions, dense, return_z, flow_torch.CHUNK_ROWS)
    return lp, log_det, x.new_empty(0) if z is None else z, x.new_empty(0), x.new_empty(0), x.new_empty(0)


@flow_wide_backward.register_kernel("cpu")
def _flow_wide_backward_on_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    if not interpreting():
        raise BackendError(NO_TRAINING)
    return _flow_wide_backward(*arguments)


@flow_wide.register_fake
def _flow_wide_fake(
    x: Tensor, dense: Tensor | None, index: Tensor | None, weights: list[Tensor], *options: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    *_, precision, _, return_z, keep = options
    rows, channels = x.shape
    z = x.new_empty(rows, channels) if return_z else x.new_empty(0)
    kept = [x.new_empty(0), x.new_empty(0), x.new_empty(0)]
    if keep:
        layers, (active, hidden) = len(weights) // len(CouplingWeights._fields), weights[2].shape
        operand = torch.float16 if precision == "float16" else torch.float32
        kept = [
            x.new_empty(layers - 1, rows, channels),
            x.new_empty(layers, rows, active, dtype=operand),
            x.new_empty(layers, rows, hidden, dtype=operand),
        ]
    return x.new_empty(rows), x.new_empty(rows), z, *kept


@flow_wide_backward.register_fake
def _flow_wide_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, dense, _, weights = arguments[7:11]
    need_x, need_dense = arguments[-2:]
    size = len(CouplingWeights._fields)
    d_x = torch.empty_like(x) if need_x else x.new_empty(0)
    d_dense = torch.empty_like(dense) if need_dense else x.new_empty(0)
    return d_x, d_dense, *(x.new_empty(len(weights) // size, *weights[i].shape) for i in range(size - 1))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dense, index, weights, *ctx.options, ctx.return_z, ctx.keep = inputs
    lp, _, _, *kept = output
    ctx.save_for_backward(x, dense, index, lp, *kept, *weights)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _gradients_of(
    ctx: Any, d_lp: Tensor | None, d_log_det: Tensor | None, d_z: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    x, dense, index, lp, states, a, hidden, *weights = ctx.saved_tensors
    need_x, need_dense = ctx.needs_input_grad[:2]
    d_x, d_dense, *stacked = flow_wide_backward(
        d_lp, d_log_det, d_z if ctx.return_z else None, lp, states, a, hidden, x, dense, index, weights,
        *ctx.options, ctx.keep, need_x, need_dense,
    )  # fmt: skip
    # W_perm is fixed.
    d_weights = [gradient for layer in zip(*stacked, strict=True) for gradient in (*layer, None)]
    nothing = [None] * (len(ctx.options) + 2)
    return d_x if need_x else None, d_dense if need_dense else None, None, d_weights, *nothing


flow_wide.register_autograd(_gradients_of, setup_context=_setup_context)
