"""One coupling layer between two matrix products of a library, for flows too wide to stay on the chip.

Of a layer (equations: fastbgad/reference/flow.py)

    a = 0.1 (W2 relu(W1 [x1; p] + b1) + b2)
    y = [x1, x2 exp(s) + a_t],  s = clamp tanh(a_s) or clamp tanh(a_s / clamp)
    out = W_perm (g y + offset)

the products are the library's; what lies between W2 and W_perm is one pass over memory here, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import tiles as chosen_tiles
from .variant import TuningCase, Variant

# What becomes of v = g y + offset, and where its gradient comes from.
ABSENT = tl.constexpr(0)  # nothing: the last layer when only |z| is asked for
PLAIN = tl.constexpr(1)  # [N, C] float32
SPLIT = tl.constexpr(2)  # [N, 3 C] 16-bit, high | low | high, for an accurate product
MOVED = tl.constexpr(3)  # [N, C] float32, each channel moved to its place: the next state itself

# Rows whose parameter gradients one program of the backward adds up, a multiple of every BR it is launched with. Enough
# programs for a few thousand rows, and partial sums that are a twentieth of the traffic.
GROUP_ROWS = 16


@triton.jit
def _tanh(a):
    """tanh(a) and its derivative 1 - tanh^2(a), from e^(-2 |a|), which never overflows."""
    e = tl.exp(-2.0 * tl.abs(a))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0, -magnitude, magnitude), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _narrow(value, dtype: tl.constexpr):
    """`value` in the operands' type. In 16 bits the finite is clamped to what fits; the infinite becomes NaN.

    An infinity made finite would hide that a row is lost.
    """
    if dtype == tl.float16:
        finite = tl.abs(value) <= 3.4028235e38  # false for NaN too
        value = tl.where(finite, tl.clamp(value, -65504.0, 65504.0), float("nan"))
    return value.to(dtype)


@triton.jit
def _store_split(OUT, row, channel, value, inside, C: tl.constexpr):
    """high | low | high, [BR, BC] of each."""
    dtype = OUT.dtype.element_ty
    high = _narrow(value, dtype)
    low = _narrow(value - high.to(tl.float32), dtype)
    at = OUT + row[:, None] * (3 * C) + channel[None, :]
    tl.store(at, high, mask=inside)
    tl.store(at + C, low, mask=inside)
    tl.store(at + 2 * C, high, mask=inside)


@triton.jit
def _store_v(V, TO, row, channel, v, inside, width, C: tl.constexpr, FORM: tl.constexpr):
    if FORM == SPLIT:
        _store_split(V, row, channel, v, inside, C)
    elif FORM == MOVED:
        place = tl.load(TO + channel, mask=channel < width, other=0)
        tl.store(V + row[:, None] * C + place[None, :], v, mask=inside)
    elif FORM == PLAIN:
        tl.store(V + row[:, None] * C + channel[None, :], v, mask=inside)


@triton.jit(do_not_specialize=["rows", "clamp", "inner_clamp"])
def coupling_forward_kernel(
    X,  # [N, C] fp32
    A,  # [N, 2 * C2], W2 relu(..) without b2
    B2,  # [2 * C2] fp32
    G,  # [C] fp32
    OFFSET,  # [C] fp32
    TO,  # [C] int64, where each channel moves
    LOG_DET,  # [N] fp32, of the layers before
    V,  # see FORM
    NEW_LOG_DET,  # [N] fp32
    SQUARE,  # [N] fp32, |v|^2
    rows,
    clamp,
    inner_clamp,
    C: tl.constexpr,
    FORM: tl.constexpr,
    WANT_SQUARE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < rows
    s_sum = tl.zeros((BR, BC), tl.float32)
    square = tl.zeros((BR, BC), tl.float32)
    for first in range(0, C1, BC):
        channel = first + tl.arange(0, BC)
        passive = inside[:, None] & (channel < C1)[None, :]
        active = inside[:, None] & (channel < C2)[None, :]
        x = X + row[:, None] * C + channel[None, :]
        a = A + row[:, None] * (2 * C2) + channel[None, :]
        x1 = tl.load(x, mask=passive, other=0.0)  # [BR, BC]
        x2 = tl.load(x + C1, mask=active, other=0.0)
        a_s = tl.load(a, mask=active, other=0.0).to(tl.float32)
        a_t = tl.load(a + C2, mask=active, other=0.0).to(tl.float32)
        a_s = 0.1 * (a_s + tl.load(B2 + channel, mask=channel < C2, other=0.0)[None, :])
        a_t = 0.1 * (a_t + tl.load(B2 + C2 + channel, mask=channel < C2, other=0.0)[None, :])

        tanh, _ = _tanh(a_s * inner_clamp)
        s = clamp * tanh
        y2 = x2 * tl.exp(s) + a_t
        v1 = x1 * tl.load(G + channel, mask=channel < C1, other=0.0)[None, :]
        v1 += tl.load(OFFSET + channel, mask=channel < C1, other=0.0)[None, :]
        v2 = y2 * tl.load(G + C1 + channel, mask=channel < C2, other=0.0)[None, :]
        v2 += tl.load(OFFSET + C1 + channel, mask=channel < C2, other=0.0)[None, :]

        # Outside the mask everything was read as zero, so s and v are zero there.
        s_sum += s
        if WANT_SQUARE:
            square += v1 * v1 + v2 * v2
        _store_v(V, TO, row, channel, v1, passive, C1, C, FORM)
        _store_v(V, TO, row, channel + C1, v2, active, C, C, FORM)
    log_det = tl.load(LOG_DET + row, mask=inside, other=0.0) + tl.sum(s_sum, 1)
    tl.store(NEW_LOG_DET + row, log_det, mask=inside)
    if WANT_SQUARE:
        tl.store(SQUARE + row, tl.sum(square, 1), mask=inside)


@triton.jit
def _load_dv(DV, TO, row, channel, inside, width, C: tl.constexpr, FORM: tl.constexpr):
    if FORM == MOVED:
        place = tl.load(TO + channel, mask=channel < width, other=0)
        return tl.load(DV + row[:, None] * C + place[None, :], mask=inside, other=0.0)
    return tl.load(DV + row[:, None] * C + channel[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows", "clamp", "inner_clamp"])
def coupling_backward_kernel(
    X,  # [N, C] fp32, the layer's input
    A,  # [N, 2 * C2], W2 relu(..) without b2
    B2,  # [2 * C2] fp32
    G,  # [C] fp32
    OFFSET,  # [C] fp32
    TO,  # [C] int64, where each channel moves
    DV,  # [N, C] fp32, see FORM
    PULL,  # [N] fp32, dv -= pull v: the gradient of -|v|^2 / 2
    D_LOG_DET,  # [N] fp32
    DX,  # [N, C] fp32, without what flows through the subnet
    DA,  # [N, 2 * C2]
    SUMS,  # [groups, 2 * C + 2 * C2] fp32: doffset | dg | db2
    rows,
    clamp,
    inner_clamp,
    C: tl.constexpr,
    FORM: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    in_passive, in_active = channel < C1, channel < C2
    b_s = tl.load(B2 + channel, mask=in_active, other=0.0)[None, :]
    b_t = tl.load(B2 + C2 + channel, mask=in_active, other=0.0)[None, :]
    g1 = tl.load(G + channel, mask=in_passive, other=0.0)[None, :]
    g2 = tl.load(G + C1 + channel, mask=in_active, other=0.0)[None, :]
    d_offset1 = tl.zeros((BR, BC), tl.float32)
    d_offset2 = tl.zeros((BR, BC), tl.float32)
    d_g1 = tl.zeros((BR, BC), tl.float32)
    d_g2 = tl.zeros((BR, BC), tl.float32)
    d_b_s = tl.zeros((BR, BC), tl.float32)
    d_b_t = tl.zeros((BR, BC), tl.float32)

    for first in range(0, GROUP, BR):
        row = tl.program_id(0).to(tl.int64) * GROUP + first + tl.arange(0, BR)
        inside = row < rows
        passive = inside[:, None] & in_passive[None, :]
        active = inside[:, None] & in_active[None, :]
        at_x = row[:, None] * C + channel[None, :]
        at_a = row[:, None] * (2 * C2) + channel[None, :]
        x1 = tl.load(X + at_x, mask=passive, other=0.0)  # [BR, BC]
        x2 = tl.load(X + at_x + C1, mask=active, other=0.0)
        a_s = tl.load(A + at_a, mask=active, other=0.0).to(tl.float32)
        a_t = tl.load(A + at_a + C2, mask=active, other=0.0).to(tl.float32)
        tanh, slope = _tanh(0.1 * inner_clamp * (a_s + b_s))
        scaled = x2 * tl.exp(clamp * tanh)
        y2 = scaled + 0.1 * (a_t + b_t)

        if FORM == ABSENT:
            dv1 = tl.zeros((BR, BC), tl.float32)
            dv2 = tl.zeros((BR, BC), tl.float32)
        else:
            dv1 = _load_dv(DV, TO, row, channel, passive, C1, C, FORM)
            dv2 = _load_dv(DV, TO, row, channel + C1, active, C, C, FORM)
        if LAST:
            pull = tl.load(PULL + row, mask=inside, other=0.0)[:, None]
            dv1 -= pull * (g1 * x1 + tl.load(OFFSET + channel, mask=in_passive, other=0.0)[None, :])
            dv2 -= pull * (g2 * y2 + tl.load(OFFSET + C1 + channel, mask=in_active, other=0.0)[None, :])
        dy2 = g2 * dv2
        # y2 = x2 exp(s) + a_t and log_det = sum(s); ds/da is clamp inner_clamp (1 - tanh^2), and a carries FrEIA's 0.1
        d_log_det = tl.load(D_LOG_DET + row, mask=inside, other=0.0)[:, None]
        da_s = (0.1 * clamp * inner_clamp) * slope * (dy2 * scaled + d_log_det)
        da_t = 0.1 * dy2
        tl.store(DX + at_x, g1 * dv1, mask=passive)
        tl.store(DX + at_x + C1, dy2 * tl.exp(clamp * tanh), mask=active)
        dtype = DA.dtype.element_ty
        tl.store(DA + at_a, _narrow(da_s, dtype), mask=active)
        tl.store(DA + at_a + C2, _narrow(da_t, dtype), mask=active)

        d_offset1 += dv1
        d_offset2 += dv2
        d_g1 += dv1 * x1
        d_g2 += dv2 * y2
        d_b_s += da_s
        d_b_t += da_t
    at = SUMS + tl.program_id(0).to(tl.int64) * (2 * C + 2 * C2) + channel
    tl.store(at, tl.sum(d_offset1, 0), mask=in_passive)
    tl.store(at + C1, tl.sum(d_offset2, 0), mask=in_active)
    tl.store(at + C, tl.sum(d_g1, 0), mask=in_passive)
    tl.store(at + C + C1, tl.sum(d_g2, 0), mask=in_active)
    tl.store(at + 2 * C, tl.sum(d_b_s, 0), mask=in_active)
    tl.store(at + 2 * C + C2, tl.sum(d_b_t, 0), mask=in_active)


@triton.jit(do_not_specialize=["rows"])
def coupling_operand_kernel(
    X,  # [N, ..] fp32
    OUT,  # [N, ..], or [N, 3 * COLUMNS] high | low | high if THREE
    rows,
    COLUMNS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    THREE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (channel < COLUMNS)[None, :]
    value = tl.load(X + row[:, None] * X_STRIDE + channel[None, :], mask=inside, other=0.0)
    if THREE:
        _store_split(OUT, row, channel, value, inside, COLUMNS)
    else:
        at = OUT + row[:, None] * OUT_STRIDE + channel[None, :]
        tl.store(at, _narrow(value, OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "largest"])
def coupling_rows_kernel(
    X,  # [N, C] fp32
    OUT,  # [N, C] fp32
    LOST,  # [N] uint8
    rows,
    largest,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < rows
    unusable = tl.zeros((BR, BC), tl.int32)
    for first in range(0, C, BC):
        channel = first + tl.arange(0, BC)
        mask = inside[:, None] & (channel < C)[None, :]
        x = tl.load(X + row[:, None] * C + channel[None, :], mask=mask, other=0.0)  # [BR, BC]
        unusable += 1 - (tl.abs(x) <= largest).to(tl.int32)  # NaN compares false
    lost = tl.sum(unusable, 1) > 0
    tl.store(LOST + row, lost.to(tl.uint8), mask=inside)
    for first in range(0, C, BC):
        channel = first + tl.arange(0, BC)
        mask = inside[:, None] & (channel < C)[None, :]
        at = row[:, None] * C + channel[None, :]
        x = tl.load(X + at, mask=mask, other=0.0)
        tl.store(OUT + at, tl.where(lost[:, None], 0.0, x), mask=mask)


class Coupling(NamedTuple):
    """What the kernels need to know of one layer."""

    b2: Tensor  # [2 * C2] float32
    g: Tensor  # [C] float32
    offset: Tensor  # [C] float32
    to: Tensor | None  # [C] int64, hard permutation: channel c of v becomes channel to[c]; None for a rotation
    clamp: float
    scaled_tanh: bool  # s = clamp tanh(a / clamp) instead of clamp tanh(a)

    @property
    def inner_clamp(self) -> float:
        """What a_s is multiplied by inside the tanh."""
        return 1 / self.clamp if self.scaled_tanh else 1.0


def coupling_forward(
    x: Tensor,  # [N, C] float32
    a: Tensor,  # [N, 2 * C2] float16 or float32
    layer: Coupling,
    log_det: Tensor,  # [N] float32
    *,
    form: int,
    want_square: bool = False,
    out: Tensor | None = None,
    tiles: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """v = g y + offset in one of the forms above (into `out` if given), log_det + sum(s) [N], and |v|^2 [N].

    What is not asked for comes back empty. `tiles` overrides the tile sizes chosen.
    """
    rows, channels = x.shape
    _check_layer(x, a, layer)
    assert log_det.shape == (rows,)
    assert log_det.is_contiguous()
    assert form != MOVED or layer.to is not None
    if out is None:
        columns = {ABSENT.value: 0, SPLIT.value: 3 * channels}.get(form, channels)
        dtype = torch.float16 if form == SPLIT else torch.float32
        out = torch.empty(rows if columns else 0, columns, dtype=dtype, device=x.device)
    assert out.is_contiguous()
    new_log_det = torch.empty_like(log_det)
    square = torch.empty(rows if want_square else 0, device=x.device)
    if rows:
        chosen = dict(chosen_tiles("coupling_forward", "rows", x.device) if tiles is None else tiles)
        with torch.cuda.device_of(x):
            coupling_forward_kernel[(triton.cdiv(rows, chosen["BR"]),)](
                x, a, layer.b2, layer.g, layer.offset, layer.to if layer.to is not None else layer.g, log_det,
                out, new_log_det, square, rows, layer.clamp, layer.inner_clamp,
                C=channels, FORM=form, WANT_SQUARE=want_square, **chosen,
            )  # fmt: skip
    return out, new_log_det, square


def coupling_backward(
    x: Tensor,  # [N, C] float32
    a: Tensor,  # [N, 2 * C2] float16 or float32
    layer: Coupling,
    dv: Tensor | None,  # [N, C] float32; the gradient of the moved v if form is MOVED; None: zero
    pull: Tensor | None,  # [N] float32, subtracts pull v from dv
    d_log_det: Tensor,  # [N] float32
    *,
    form: int,
    tiles: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients: dx [N, C] but for the subnet's share, da [N, 2 * C2], doffset [C], dg [C], db2 [2 * C2]."""
    rows, channels = x.shape
    active = channels // 2
    _check_layer(x, a, layer)
    assert (dv is None) == (form == ABSENT)
    assert dv is None or (dv.shape == x.shape and dv.is_contiguous())
    assert d_log_det.shape == (rows,)
    assert d_log_det.is_contiguous()
    dx, da = torch.empty_like(x), torch.empty_like(a)
    groups = triton.cdiv(rows, GROUP_ROWS)
    sums = torch.empty(groups, 2 * channels + 2 * active, device=x.device)
    if rows:
        chosen = dict(chosen_tiles("coupling_backward", "rows", x.device) if tiles is None else tiles)
        assert GROUP_ROWS % chosen["BR"] == 0
        with torch.cuda.device_of(x):
            coupling_backward_kernel[(groups, triton.cdiv(channels - active, chosen["BC"]))](
                x, a, layer.b2, layer.g, layer.offset, layer.to if layer.to is not None else layer.g,
                dv if dv is not None else x, pull if pull is not None else d_log_det, d_log_det, dx, da, sums,
                rows, layer.clamp, layer.inner_clamp,
                C=channels, FORM=form, LAST=pull is not None, GROUP=GROUP_ROWS, **chosen,
            )  # fmt: skip
    d_offset, d_g, d_b2 = sums.sum(dim=0).split([channels, channels, 2 * active])
    return dx, da, d_offset, d_g, d_b2


def coupling_operand(x: Tensor, out: Tensor, *, three: bool = False, tiles: Mapping[str, int] | None = None) -> None:
    """Writes x [N, K] into out, in the type of a matrix product's operand.

    `out` is [N, K], a view into longer rows if need be, or [N, 3 K] for high | low | high.
    """
    rows, columns = x.shape
    assert x.dtype == torch.float32
    assert out.shape == (rows, 3 * columns if three else columns)
    assert columns == 1 or x.stride(1) == out.stride(1) == 1
    assert not three or out.is_contiguous()
    if rows and columns:
        chosen = dict(chosen_tiles("coupling_forward", "operand", x.device) if tiles is None else tiles)
        with torch.cuda.device_of(x):
            coupling_operand_kernel[(triton.cdiv(rows, chosen["BR"]), triton.cdiv(columns, chosen["BC"]))](
                x, out, rows, COLUMNS=columns, X_STRIDE=x.stride(0), OUT_STRIDE=out.stride(0), THREE=three, **chosen,
            )  # fmt: skip


def coupling_rows(
    x: Tensor,  # [N, C] float32
    largest: float,
    *,
    tiles: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """x with zeros for the rows that hold a NaN or a value beyond +-largest, and which rows these are, bool [N].

    Zeros travel through a flow and back without touching any other row's gradient; a NaN does not.
    """
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    rows, channels = x.shape
    clean, lost = torch.empty_like(x), torch.empty(rows, dtype=torch.uint8, device=x.device)
    if rows:
        chosen = dict(chosen_tiles("coupling_forward", "rows", x.device) if tiles is None else tiles)
        with torch.cuda.device_of(x):
            coupling_rows_kernel[(triton.cdiv(rows, chosen["BR"]),)](
                x, clean, lost, rows, largest, C=channels, **chosen
            )
    return clean, lost.view(torch.bool)


def _check_layer(x: Tensor, a: Tensor, layer: Coupling) -> None:
    rows, channels = x.shape
    assert a.shape == (rows, 2 * (channels // 2))
    assert a.dtype in (torch.float16, torch.float32)
    assert layer.b2.shape == a.shape[1:]
    assert layer.g.shape == layer.offset.shape == x.shape[1:]
    assert x.dtype == layer.b2.dtype == layer.g.dtype == layer.offset.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (x, a, layer.b2, layer.g, layer.offset))
    assert layer.to is None or (layer.to.shape == x.shape[1:] and layer.to.dtype == torch.int64)


def variants() -> list[Variant]:
    """The configurations compiled ahead of time: every form at 512 channels, the common one at an odd and a large C."""
    cpu = torch.device("cpu")
    forward, backward = chosen_tiles("coupling_forward", "rows", cpu), chosen_tiles("coupling_backward", "rows", cpu)
    operand = chosen_tiles("coupling_forward", "operand", cpu)
    layer = {"X": "*fp32", "B2": "*fp32", "G": "*fp32", "OFFSET": "*fp32", "TO": "*i64"}
    layer |= {"rows": "i32", "clamp": "fp32", "inner_clamp": "fp32"}
    found = []
    for channels, name, a, form in (
        (301, "split", "*fp16", SPLIT),
        (512, "split", "*fp16", SPLIT),
        (512, "plain", "*fp32", PLAIN),
        (512, "moved", "*fp16", MOVED),
        (512, "last", "*fp16", ABSENT),
        (2048, "split", "*fp16", SPLIT),
    ):
        last = form == ABSENT
        types = {"A": a, "V": "*fp16" if form == SPLIT else "*fp32", "LOG_DET": "*fp32", "NEW_LOG_DET": "*fp32"}
        constants = {"C": channels, "FORM": form.value, "WANT_SQUARE": last}
        found.append(
            _variant(
                f"coupling_forward C={channels} {name}", coupling_forward_kernel,
                layer | types | {"SQUARE": "*fp32"}, constants, forward,
            )
        )  # fmt: skip
        types = {"A": a, "DA": a, **dict.fromkeys(("DV", "PULL", "D_LOG_DET", "DX", "SUMS"), "*fp32")}
        # The gradient of v is float32, whatever went into the forward's product.
        back = PLAIN if form == SPLIT else form
        constants = {"C": channels, "FORM": back.value, "LAST": last, "GROUP": GROUP_ROWS}
        found.append(
            _variant(
                f"coupling_backward C={channels} {name}", coupling_backward_kernel, layer | types, constants, backward
            )
        )
    types = {"X": "*fp32", "OUT": "*fp32", "LOST": "*u8", "rows": "i32", "largest": "fp32"}
    found.append(_variant("coupling_rows C=512", coupling_rows_kernel, types, {"C": 512}, forward))
    for three in (False, True):
        types = {"X": "*fp32", "OUT": "*fp16", "rows": "i32"}
        constants = {"COLUMNS": 512, "X_STRIDE": 512, "OUT_STRIDE": 1536 if three else 640, "THREE": three}
        name = f"coupling_operand C=512 {'split' if three else 'narrow'}"
        found.append(_variant(name, coupling_operand_kernel, types, constants, operand))
    return found


def _variant(
    name: str, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], tiles: Mapping[str, int]
) -> Variant:
    sizes = {"BR": tiles["BR"], "BC": tiles["BC"]}
    # Launches leave the number of stages to Triton, which takes 3.
    return Variant(name, kernel, types, {**constants, **sizes}, tiles["num_warps"], num_stages=3)


def tuning_cases() -> list[TuningCase]:
    """Tile sizes do not depend on the channels: one training step of 4096 rows at 512 of them."""

    def problem(device: torch.device) -> tuple[Tensor, Tensor, Coupling, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, a = (torch.randn(4096, 512, generator=generator).to(device) for _ in range(2))
        ones = torch.ones(512, device=device)
        return x, a.half(), Coupling(ones, ones, ones, None, 1.9, False), torch.zeros(4096, device=device)

    def forward(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        x, a, layer, log_det = problem(device)
        return lambda tiles: coupling_forward(x, a, layer, log_det, form=SPLIT.value, tiles=tiles)[:2]

    def backward(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        x, a, layer, d_log_det = problem(device)
        return lambda tiles: coupling_backward(x, a, layer, x, None, d_log_det, form=PLAIN.value, tiles=tiles)

    def operand(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        x = problem(device)[0]

        def run(tiles: Mapping[str, int]) -> Sequence[Tensor]:
            out = torch.empty(len(x), 3 * 512, dtype=torch.float16, device=device)
            coupling_operand(x, out, three=True, tiles=tiles)
            return (out,)

        return run

    def candidates(*sizes: tuple[int, int, int]) -> list[dict[str, int]]:
        return [{"BR": rows, "BC": columns, "num_warps": warps} for rows, columns, warps in sizes]

    one_pass = ((1, 256, 1), (1, 256, 2), (2, 128, 2), (2, 256, 2), (2, 256, 4), (4, 128, 2), (4, 256, 8), (8, 128, 4))
    # BR divides GROUP_ROWS; larger tiles would spill the sums.
    sums = ((2, 64, 1), (2, 128, 2), (2, 128, 4), (4, 64, 2), (4, 64, 4), (4, 128, 8), (8, 64, 4), (8, 128, 8))
    return [
        TuningCase("coupling_forward", "rows", candidates(*one_pass), forward),
        TuningCase("coupling_forward", "operand", candidates(*one_pass, (8, 256, 8)), operand),
        TuningCase("coupling_backward", "rows", candidates(*sums), backward),
    ]
