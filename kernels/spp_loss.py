"""The loss of one chunk of rows and its gradient, without a host sync, an atomic or a boolean index.

    L = L_ml + lambda (L_n + L_a),        u = lp / normalizer
    L_ml = mean over normals of w * -log sigmoid(lp)     (or of w * -lp * C)
    L_n = mean over normals with u <= b_n of w (b_n - u),        L_a = mean over anomalies with u >= b_a of w (u - b_a)

(or sums instead of the last two means; w are the focal weights, or 1). A term without a row is 0 with zero gradient.

Up to SMALL_LIMIT rows one program does everything in one launch, boundary included. Above it the boundary comes first,
then every program writes six partial sums and one last program adds them up in float64, in a fixed order. The backward
is one elementwise launch that works the weights out again, so nothing but lp, the mask and scalars is kept for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .boundary import (
    SMALL_LIMIT,
    SMALL_TILES,
    boundary_forward,
    boundary_of_key,
    check_rows,
    ordered_key,
    select_key,
    small_tile,
)
from .variant import Variant

# The focal weights look at lp / 10 whatever the normalizer is, and hold |u| above a smallest value.
FOCAL_NORMALIZER: tl.constexpr = tl.constexpr(10.0)
FOCAL_SMALLEST_U: tl.constexpr = tl.constexpr(1e-6)

# Rows of a program of the partial sums and of the gradient, and how many partial sums are added up at a time.
TILE = 1024
FINISH_TILE = 1024
WARPS = 8


class Terms(NamedTuple):
    """What the loss launches write: float32 scalars, then int64 scalars."""

    total: Tensor
    ml: Tensor
    normal: Tensor
    anomalous: Tensor
    b_n: Tensor
    b_a: Tensor
    n_normal: Tensor  # rows under L_ml
    normal_violations: Tensor  # rows under L_n
    anomalous_violations: Tensor  # rows under L_a


@triton.jit
def minus_logsigmoid(x):
    """-log sigmoid(x) = max(-x, 0) + log(1 + e), e = exp(-|x|), accurate to the last bits for every x.

    log(1 + e) = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...) with s = e / (2 + e) <= 1/3; the first term left out is
    below 1e-9 of the whole.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    t = s * s
    series = 1.0 / 13 + t * (1.0 / 15 + t * (1.0 / 17))
    series = 1.0 / 7 + t * (1.0 / 9 + t * (1.0 / 11 + t * series))
    series = 1.0 + t * (1.0 / 3 + t * (1.0 / 5 + t * series))
    return tl.maximum(-x, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid_of_minus(x):
    """sigmoid(-x), without overflow: the slope of log sigmoid at x."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, e, 1.0) / (1.0 + e)


@triton.jit
def focal_weights(x, is_anomalous):
    """Normal rows: 1 if u > -0.2 else 11.7 (1 - e^u)^0.5 |u|; anomalous: 1 if u <= -1 else 0.53 (1 + e^u)^2 / |u|."""
    u = tl.div_rn(x, FOCAL_NORMALIZER)
    size = tl.abs(u)
    probability = tl.exp(u)
    # The root is taken of values that may be negative where its result is not used.
    hard_normal = 11.7 * tl.sqrt(tl.maximum(1.0 - probability, 0.0)) * size
    hard_anomalous = 0.53 * (1.0 + probability) * (1.0 + probability) / tl.maximum(size, FOCAL_SMALLEST_U)
    return tl.where(is_anomalous, tl.where(u > -1.0, hard_anomalous, 1.0), tl.where(u > -0.2, 1.0, hard_normal))


@triton.jit
def row_sums(
    x,  # [BLOCK] lp
    is_normal,  # [BLOCK] bool; a row outside the data is neither normal nor anomalous
    is_anomalous,  # [BLOCK] bool
    b_n, b_a, channels, normalizer,
    NLL: tl.constexpr, FOCAL: tl.constexpr,
):  # fmt: skip
    """Sums over these rows: L_ml and its rows, L_n and its rows, L_a and its rows."""
    # Correctly rounded, as the boundary's own division: a row that lies on the boundary violates.
    u = tl.div_rn(x, normalizer)
    if NLL:
        ml = -x * channels
    else:
        ml = minus_logsigmoid(x)
    pull = b_n - u
    push = u - b_a
    if FOCAL:
        w = focal_weights(x, is_anomalous)
        ml *= w
        pull *= w
        push *= w
    # A NaN boundary makes both comparisons false. where, not a product: what a row holds outside its term is arbitrary.
    pulled = is_normal & (u <= b_n)
    pushed = is_anomalous & (u >= b_a)
    return (
        tl.sum(tl.where(is_normal, ml, 0.0), 0),
        tl.sum(is_normal.to(tl.int32), 0),
        tl.sum(tl.where(pulled, pull, 0.0), 0),
        tl.sum(pulled.to(tl.int32), 0),
        tl.sum(tl.where(pushed, push, 0.0), 0),
        tl.sum(pushed.to(tl.int32), 0),
    )


@triton.jit
def share(term_sum, rows, MEAN: tl.constexpr):
    """A term from its sum, float64 -> float32; no row leaves 0."""
    if MEAN:
        term_sum = term_sum.to(tl.float64) / tl.maximum(rows, 1).to(tl.float64)
    return term_sum.to(tl.float32)


@triton.jit
def store_terms(
    total, ml, normal, anomalous, n_normal, normal_violations, anomalous_violations,  # pointers
    ml_sum, rows, pull_sum, pulled, push_sum, pushed,  # scalars
    lam,
    MEAN: tl.constexpr, PUSH: tl.constexpr,
):  # fmt: skip
    l_ml = share(ml_sum, rows, True)
    l_n = share(pull_sum, pulled, MEAN)
    if PUSH:
        l_a = share(push_sum, pushed, MEAN)
    else:
        l_a = 0.0
    tl.store(total, l_ml + lam * (l_n + l_a))
    tl.store(ml, l_ml)
    tl.store(normal, l_n)
    tl.store(anomalous, l_a)
    tl.store(n_normal, rows.to(tl.int64))
    tl.store(normal_violations, pulled.to(tl.int64))
    tl.store(anomalous_violations, pushed.to(tl.int64))


@triton.jit
def spp_loss_small_kernel(
    lp,  # [N] float32
    mask,  # [N] uint8, not 0: anomalous
    total, ml, normal, anomalous, b_n, b_a, n_normal, normal_violations, anomalous_violations,  # scalars, see Terms
    N, channels, tau, lam, normalizer,
    BETA: tl.constexpr, NLL: tl.constexpr, MEAN: tl.constexpr, FOCAL: tl.constexpr, PUSH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Boundary and loss of at most BLOCK rows in one program."""
    rows = tl.arange(0, BLOCK)
    inside = rows < N
    x = tl.load(lp + rows, mask=inside, other=0.0)  # [BLOCK]
    is_anomalous = inside & (tl.load(mask + rows, mask=inside, other=0) != 0)  # [BLOCK]
    is_normal = inside & ~is_anomalous
    key, count = select_key(ordered_key(x), is_normal, BETA)
    edge_n = boundary_of_key(key, count, normalizer)
    edge_a = edge_n - tau
    ml_sum, count, pull_sum, pulled, push_sum, pushed = row_sums(
        x, is_normal, is_anomalous, edge_n, edge_a, channels, normalizer, NLL, FOCAL
    )
    tl.store(b_n, edge_n)
    tl.store(b_a, edge_a)
    store_terms(
        total, ml, normal, anomalous, n_normal, normal_violations, anomalous_violations,
        ml_sum, count, pull_sum, pulled, push_sum, pushed, lam, MEAN, PUSH,
    )  # fmt: skip


@triton.jit
def spp_loss_partial_kernel(
    lp,  # [N] float32
    mask,  # [N] uint8, not 0: anomalous
    b_n, b_a,  # scalars float32
    partial,  # [6, programs] float32
    N, channels, normalizer,
    NLL: tl.constexpr, FOCAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The six sums over BLOCK rows; a count of BLOCK rows is exact in float32."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    inside = rows < N - start
    x = tl.load(lp + start + rows, mask=inside, other=0.0)  # [BLOCK]
    is_anomalous = inside & (tl.load(mask + start + rows, mask=inside, other=0) != 0)  # [BLOCK]
    ml_sum, count, pull_sum, pulled, push_sum, pushed = row_sums(
        x, inside & ~is_anomalous, is_anomalous, tl.load(b_n), tl.load(b_a), channels, normalizer, NLL, FOCAL
    )
    column = partial + program
    programs = tl.num_programs(0)
    tl.store(column, ml_sum)
    tl.store(column + programs, count.to(tl.float32))
    tl.store(column + 2 * programs, pull_sum)
    tl.store(column + 3 * programs, pulled.to(tl.float32))
    tl.store(column + 4 * programs, push_sum)
    tl.store(column + 5 * programs, pushed.to(tl.float32))


@triton.jit
def load_double(partial, columns, programs):
    return tl.load(partial + columns, mask=columns < programs, other=0.0).to(tl.float64)


@triton.jit
def spp_loss_finish_kernel(
    partial,  # [6, programs] float32
    total, ml, normal, anomalous, n_normal, normal_violations, anomalous_violations,  # scalars, see Terms
    programs, lam,
    MEAN: tl.constexpr, PUSH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums up in float64, in an order that depends on nothing but N."""
    ml_sum = tl.zeros([BLOCK], tl.float64)
    rows = tl.zeros([BLOCK], tl.float64)
    pull_sum = tl.zeros([BLOCK], tl.float64)
    pulled = tl.zeros([BLOCK], tl.float64)
    push_sum = tl.zeros([BLOCK], tl.float64)
    pushed = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        ml_sum += load_double(partial, columns, programs)
        rows += load_double(partial + programs, columns, programs)
        pull_sum += load_double(partial + 2 * programs, columns, programs)
        pulled += load_double(partial + 3 * programs, columns, programs)
        push_sum += load_double(partial + 4 * programs, columns, programs)
        pushed += load_double(partial + 5 * programs, columns, programs)
    store_terms(
        total, ml, normal, anomalous, n_normal, normal_violations, anomalous_violations,
        tl.sum(ml_sum, 0), tl.sum(rows, 0).to(tl.int64), tl.sum(pull_sum, 0), tl.sum(pulled, 0).to(tl.int64),
        tl.sum(push_sum, 0), tl.sum(pushed, 0).to(tl.int64), lam, MEAN, PUSH,
    )  # fmt: skip


@triton.jit
def upstream(g):
    """An upstream gradient; None where the term was not used."""
    if g is None:
        return 0.0
    else:  # noqa: RET505, the compiler needs both branches of a test of None
        return tl.load(g)


@triton.jit
def spp_loss_backward_kernel(
    lp,  # [N] float32
    mask,  # [N] uint8, not 0: anomalous
    b_n, b_a, n_normal, normal_violations, anomalous_violations,  # scalars of the forward
    g_total, g_ml, g_normal, g_anomalous,  # scalars float32, upstream gradients; None counts as 0
    d_lp,  # [N] float32
    N, channels, lam, normalizer,
    NLL: tl.constexpr, MEAN: tl.constexpr, FOCAL: tl.constexpr, PUSH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of three terms, g_ml, g_n and g_a being the upstream gradients of L_ml, L_n and L_a:

        normal rows:                 g_ml w dL_ml/dlp / n_normal
        normal with u <= b_n:        - g_n w / (normalizer n_violating)
        anomalous with u >= b_a:     + g_a w / (normalizer n_violating)

    Boundary and weights are constants. A term without an upstream gradient is left out.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    inside = rows < N - start
    x = tl.load(lp + start + rows, mask=inside, other=0.0)  # [BLOCK]
    is_anomalous = tl.load(mask + start + rows, mask=inside, other=0) != 0  # [BLOCK]
    is_normal = inside & ~is_anomalous
    w = 1.0
    if FOCAL:
        w = focal_weights(x, is_anomalous)
    g = upstream(g_total)
    # where, not products: an infinite weight or slope of a row outside a term must not turn into 0 * inf.
    slope = tl.zeros([BLOCK], tl.float32)
    if (g_total is not None) or (g_ml is not None):
        g_row = (g + upstream(g_ml)) / tl.maximum(tl.load(n_normal), 1).to(tl.float32)
        if NLL:
            of_row = -g_row * channels
        else:
            of_row = -g_row * sigmoid_of_minus(x)
        slope += tl.where(is_normal, of_row * w, 0.0)
    u = tl.div_rn(x, normalizer)
    if (g_total is not None) or (g_normal is not None):
        g_row = (lam * g + upstream(g_normal)) / normalizer
        if MEAN:
            g_row /= tl.maximum(tl.load(normal_violations), 1).to(tl.float32)
        slope -= tl.where(is_normal & (u <= tl.load(b_n)), g_row * w, 0.0)
    if PUSH and ((g_total is not None) or (g_anomalous is not None)):
        g_row = (lam * g + upstream(g_anomalous)) / normalizer
        if MEAN:
            g_row /= tl.maximum(tl.load(anomalous_violations), 1).to(tl.float32)
        slope += tl.where(is_anomalous & (u >= tl.load(b_a)), g_row * w, 0.0)
    tl.store(d_lp + start + rows, slope, mask=inside)


def spp_loss_forward(
    lp: Tensor,  # [N] float32, contiguous
    anomalous: Tensor,  # [N] bool, contiguous
    channels: int,
    *,
    beta: float, tau: float, lam: float, normalizer: float, nll: bool, mean: bool, focal: bool, push: bool,
    edges: tuple[Tensor, Tensor] | None = None, tile: int = TILE, finish_tile: int = FINISH_TILE,
) -> Terms:  # fmt: skip
    """The loss and its boundary; `edges` (b_n, b_a; float32 scalars) replaces the boundary of these rows."""
    check_rows(lp, anomalous)
    rows = len(lp)
    terms = [torch.empty((), dtype=torch.float32, device=lp.device) for _ in range(4)]
    counts = [torch.empty((), dtype=torch.int64, device=lp.device) for _ in range(3)]
    mask = anomalous.view(torch.uint8)
    if edges is None and rows <= SMALL_LIMIT:
        b_n, b_a = (torch.empty((), dtype=torch.float32, device=lp.device) for _ in range(2))
        block = small_tile(rows)
        spp_loss_small_kernel[(1,)](
            lp, mask, *terms, b_n, b_a, *counts, rows, channels, float(tau), float(lam), float(normalizer),
            BETA=float(beta), NLL=nll, MEAN=mean, FOCAL=focal, PUSH=push, BLOCK=block, num_warps=SMALL_TILES[block],
        )  # fmt: skip
        return Terms._make([*terms, b_n, b_a, *counts])
    b_n, b_a = boundary_forward(lp, anomalous, beta, tau, normalizer)[:2] if edges is None else edges
    programs = max(triton.cdiv(rows, tile), 1)
    partial = torch.empty(6, programs, dtype=torch.float32, device=lp.device)
    spp_loss_partial_kernel[(programs,)](
        lp, mask, b_n, b_a, partial, rows, channels, float(normalizer),
        NLL=nll, FOCAL=focal, BLOCK=tile, num_warps=WARPS,
    )  # fmt: skip
    spp_loss_finish_kernel[(1,)](
        partial, *terms, *counts, programs, float(lam), MEAN=mean, PUSH=push, BLOCK=finish_tile, num_warps=WARPS
    )
    return Terms._make([*terms, b_n, b_a, *counts])


def spp_loss_backward(
    lp: Tensor,  # [N] float32, contiguous
    anomalous: Tensor,  # [N] bool, contiguous
    channels: int,
    terms: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # b_n, b_a and the three counts of the forward
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],  # of total, ml, normal, anomalous
    *,
    lam: float, normalizer: float, nll: bool, mean: bool, focal: bool, push: bool,
) -> Tensor:  # fmt: skip
    """d_lp [N]."""
    check_rows(lp, anomalous)
    d_lp = torch.empty_like(lp)
    if len(lp) > 0:
        spp_loss_backward_kernel[(triton.cdiv(len(lp), TILE),)](
            lp, anomalous.view(torch.uint8), *terms, *upstream, d_lp, len(lp), channels, float(lam), float(normalizer),
            NLL=nll, MEAN=mean, FOCAL=focal, PUSH=push, BLOCK=TILE, num_warps=WARPS,
        )  # fmt: skip
    return d_lp


def variants() -> list[Variant]:
    """What ships, for the ahead-of-time gate: every tile with the official code's options and with the slides'."""
    rows = {"lp": "*fp32", "mask": "*u8", "N": "i32", "channels": "i32", "normalizer": "fp32"}
    terms = dict.fromkeys(("total", "ml", "normal", "anomalous"), "*fp32")
    edges = {"b_n": "*fp32", "b_a": "*fp32"}
    counts = dict.fromkeys(("n_normal", "normal_violations", "anomalous_violations"), "*i64")
    official = {"NLL": False, "MEAN": True, "FOCAL": True, "PUSH": True}
    paper = {"NLL": True, "MEAN": False, "FOCAL": False, "PUSH": True}
    constants: dict[str, Any]
    found = []
    for name, options in (("focal logsigmoid mean", official), ("nll sum", paper)):
        of_rows = {key: options[key] for key in ("NLL", "FOCAL")}
        of_terms = {key: options[key] for key in ("MEAN", "PUSH")}
        for tile, warps in SMALL_TILES.items():
            types = {**rows, **terms, **edges, **counts, "tau": "fp32", "lam": "fp32"}
            constants = {"BETA": 0.01, **options, "BLOCK": tile}
            found.append(Variant(f"spp_loss_small {tile} {name}", spp_loss_small_kernel, types, constants, warps))
        types = {**rows, **edges, "partial": "*fp32"}
        constants = {**of_rows, "BLOCK": TILE}
        found.append(Variant(f"spp_loss_partial {name}", spp_loss_partial_kernel, types, constants, WARPS))
        types = {**terms, **counts, "partial": "*fp32", "programs": "i32", "lam": "fp32"}
        constants = {**of_terms, "BLOCK": FINISH_TILE}
        found.append(Variant(f"spp_loss_finish {name}", spp_loss_finish_kernel, types, constants, WARPS))
        # A training step asks for the gradient of the total alone.
        types = {**rows, **edges, **counts, "g_total": "*fp32", "d_lp": "*fp32", "lam": "fp32"}
        constants = {"g_ml": None, "g_normal": None, "g_anomalous": None, **options, "BLOCK": TILE}
        found.append(Variant(f"spp_loss_backward {name}", spp_loss_backward_kernel, types, constants, WARPS))
    return found
