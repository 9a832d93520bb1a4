"""The loss of one chunk of rows and its gradient, without a host sync, an atomic or a boolean index.

    L = L_ml + lambda (L_n + L_a),        u = lp / normalizer
    L_ml = mean over normals of w * -log sigmoid(lp)     (or of w * -lp * C)
    L_n = mean over normals with u <= b_n of w (b_n - u),        L_a = mean over anomalies with u >= b_a of w (u - b_a)

(or sums instead of the last two means; w are the focal weights, or 1). A term without a row is 0 with zero gradient.

Up to SMALL_LIMIT rows, one program computes everything in one launch, the boundary included. Above it, the boundary
comes first, then every program writes six partial sums, and one last program adds them up in float64, in a fixed order.
The backward is one elementwise launch that recomputes the weights, so only lp, the mask and scalars are saved for it.
"""

from __future__ import annotations

from typing import NamedTuple

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

# The focal weights use u = lp / 10 whatever the normalizer is, and hold |u| above a smallest value.
FOCAL_NORMALIZER: tl.constexpr = tl.constexpr(10.0)
FOCAL_SMALLEST_U: tl.constexpr = tl.constexpr(1e-6)

# Rows of a tile of the partial sums and of the gradient, and the number of partial sums that are added up at a time.
TILE = 1024
FINISH_TILE = 1024
WARPS = 8


class Terms(NamedTuple):
    """Results of the loss launches: float32 scalars, then int64 scalars."""

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
    """Return -log sigmoid(x) = max(-x, 0) + log(1 + e), e = exp(-|x|), accurate to the last bits for every x.

    log(1 + e) = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...) with s = e / (2 + e) <= 1/3; the first omitted term is
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
    """Return sigmoid(-x), the slope of log sigmoid at x, without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, e, 1.0) / (1.0 + e)


@triton.jit
def focal_weights(
    lp,  # [BM] float32
    is_anomalous,  # [BM] bool
):
    """Return the weight of each row, with u = lp / 10.

    Normal rows: 1 if u > -0.2 else 11.7 (1 - e^u)^0.5 |u|; anomalous: 1 if u <= -1 else 0.53 (1 + e^u)^2 / |u|.
    """
    u = tl.div_rn(lp, FOCAL_NORMALIZER)
    size = tl.abs(u)
    probability = tl.exp(u)
    # Where the root is not used, its argument may be negative.
    hard_normal = 11.7 * tl.sqrt(tl.maximum(1.0 - probability, 0.0)) * size
    hard_anomalous = 0.53 * (1.0 + probability) * (1.0 + probability) / tl.maximum(size, FOCAL_SMALLEST_U)
    return tl.where(is_anomalous, tl.where(u > -1.0, hard_anomalous, 1.0), tl.where(u > -0.2, 1.0, hard_normal))


@triton.jit
def row_sums(
    lp,  # [BM] float32
    is_normal,  # [BM] bool; a row outside the data is neither normal nor anomalous
    is_anomalous,  # [BM] bool
    boundary,  # b_n and b_a, float32
    channels,  # int32
    normalizer,  # float32
    NLL: tl.constexpr,
    FOCAL: tl.constexpr,
):
    """Return sums over these rows: L_ml and its rows, L_n and its rows, L_a and its rows."""
    b_n, b_a = boundary
    # Correctly rounded, as the boundary's own division: a row that lies on the boundary must violate it.
    u = tl.div_rn(lp, normalizer)
    if NLL:
        ml = -lp * channels
    else:
        ml = minus_logsigmoid(lp)
    pull = b_n - u
    push = u - b_a
    if FOCAL:
        w = focal_weights(lp, is_anomalous)
        ml *= w
        pull *= w
        push *= w
    # A NaN boundary makes both comparisons false. where, not a product: the value of a row outside a term is arbitrary.
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
def term_of(
    term_sum,  # float
    rows,  # int
    MEAN: tl.constexpr,
):
    """Return a term from its sum, float32, divided in float64; a term without a row is 0."""
    if MEAN:
        term_sum = term_sum.to(tl.float64) / tl.maximum(rows, 1).to(tl.float64)
    return term_sum.to(tl.float32)


@triton.jit
def store_terms(
    term_ptrs,  # of L, L_ml, L_n and L_a, scalars float32
    count_ptrs,  # of the rows under L_ml, L_n and L_a, scalars int64
    sums,  # of `row_sums`, over all rows
    lam,  # float32
    MEAN: tl.constexpr,
    PUSH: tl.constexpr,
):
    """Store the terms of the loss and their numbers of rows."""
    l_total_ptr, l_ml_ptr, l_n_ptr, l_a_ptr = term_ptrs
    n_normal_ptr, normal_violations_ptr, anomalous_violations_ptr = count_ptrs
    ml_sum, n_normal, pull_sum, pulled, push_sum, pushed = sums
    l_ml = term_of(ml_sum, n_normal, True)
    l_n = term_of(pull_sum, pulled, MEAN)
    if PUSH:
        l_a = term_of(push_sum, pushed, MEAN)
    else:
        l_a = 0.0
    tl.store(l_total_ptr, l_ml + lam * (l_n + l_a))
    tl.store(l_ml_ptr, l_ml)
    tl.store(l_n_ptr, l_n)
    tl.store(l_a_ptr, l_a)
    tl.store(n_normal_ptr, n_normal.to(tl.int64))
    tl.store(normal_violations_ptr, pulled.to(tl.int64))
    tl.store(anomalous_violations_ptr, pushed.to(tl.int64))


@triton.jit
def spp_loss_small_kernel(
    lp_ptr,  # [N] float32
    anomalous_ptr,  # [N] uint8, nonzero: anomalous
    l_total_ptr,  # scalar float32, L
    l_ml_ptr,  # scalar float32
    l_n_ptr,  # scalar float32
    l_a_ptr,  # scalar float32
    b_n_ptr,  # scalar float32
    b_a_ptr,  # scalar float32
    n_normal_ptr,  # scalar int64, see Terms
    normal_violations_ptr,  # scalar int64
    anomalous_violations_ptr,  # scalar int64
    rows,  # int32, N
    channels,  # int32
    tau,  # float32
    lam,  # float32
    normalizer,  # float32
    BETA: tl.constexpr,
    NLL: tl.constexpr,
    MEAN: tl.constexpr,
    FOCAL: tl.constexpr,
    PUSH: tl.constexpr,
    BM: tl.constexpr,
):
    """Compute boundary and loss of at most BM rows in one program."""
    row = tl.arange(0, BM)  # [BM]
    inside = row < rows
    lp = tl.load(lp_ptr + row, mask=inside, other=0.0)  # [BM]
    is_anomalous = inside & (tl.load(anomalous_ptr + row, mask=inside, other=0) != 0)  # [BM]
    is_normal = inside & ~is_anomalous  # [BM]
    key, count = select_key(ordered_key(lp), is_normal, BETA)
    b_n = boundary_of_key(key, count, normalizer)
    b_a = b_n - tau
    sums = row_sums(lp, is_normal, is_anomalous, (b_n, b_a), channels, normalizer, NLL, FOCAL)
    tl.store(b_n_ptr, b_n)
    tl.store(b_a_ptr, b_a)
    term_ptrs = (l_total_ptr, l_ml_ptr, l_n_ptr, l_a_ptr)
    store_terms(term_ptrs, (n_normal_ptr, normal_violations_ptr, anomalous_violations_ptr), sums, lam, MEAN, PUSH)


@triton.jit
def spp_loss_partial_kernel(
    lp_ptr,  # [N] float32
    anomalous_ptr,  # [N] uint8, nonzero: anomalous
    b_n_ptr,  # scalar float32
    b_a_ptr,  # scalar float32
    partial_ptr,  # [6, tiles] float32
    rows,  # int32, N
    channels,  # int32
    normalizer,  # float32
    NLL: tl.constexpr,
    FOCAL: tl.constexpr,
    BM: tl.constexpr,
):
    """Compute the six sums over a tile of rows; a count of BM rows is exact in float32."""
    tile = tl.program_id(0)
    start = tile.to(tl.int64) * BM
    row = tl.arange(0, BM)  # [BM]
    inside = row < rows - start
    lp = tl.load(lp_ptr + start + row, mask=inside, other=0.0)  # [BM]
    is_anomalous = inside & (tl.load(anomalous_ptr + start + row, mask=inside, other=0) != 0)  # [BM]
    boundary = (tl.load(b_n_ptr), tl.load(b_a_ptr))
    ml_sum, n_normal, pull_sum, pulled, push_sum, pushed = row_sums(
        lp, inside & ~is_anomalous, is_anomalous, boundary, channels, normalizer, NLL, FOCAL
    )
    tile_ptr = partial_ptr + tile
    tiles = tl.num_programs(0)
    tl.store(tile_ptr, ml_sum)
    tl.store(tile_ptr + tiles, n_normal.to(tl.float32))
    tl.store(tile_ptr + 2 * tiles, pull_sum)
    tl.store(tile_ptr + 3 * tiles, pulled.to(tl.float32))
    tl.store(tile_ptr + 4 * tiles, push_sum)
    tl.store(tile_ptr + 5 * tiles, pushed.to(tl.float32))


@triton.jit
def load_double(partial_ptr, tile, tiles):
    """Return one partial sum of each tile, float64 [BT]; 0 beyond the last tile."""
    return tl.load(partial_ptr + tile, mask=tile < tiles, other=0.0).to(tl.float64)


@triton.jit
def spp_loss_finish_kernel(
    partial_ptr,  # [6, tiles] float32
    l_total_ptr,  # scalar float32, L
    l_ml_ptr,  # scalar float32
    l_n_ptr,  # scalar float32
    l_a_ptr,  # scalar float32
    n_normal_ptr,  # scalar int64, see Terms
    normal_violations_ptr,  # scalar int64
    anomalous_violations_ptr,  # scalar int64
    tiles,  # int32
    lam,  # float32
    MEAN: tl.constexpr,
    PUSH: tl.constexpr,
    BT: tl.constexpr,
):
    """Add up the partial sums in float64, in an order that depends on N alone."""
    ml_sum = tl.zeros([BT], tl.float64)
    n_normal = tl.zeros([BT], tl.float64)
    pull_sum = tl.zeros([BT], tl.float64)
    pulled = tl.zeros([BT], tl.float64)
    push_sum = tl.zeros([BT], tl.float64)
    pushed = tl.zeros([BT], tl.float64)
    for start in range(0, tiles, BT):
        tile = start + tl.arange(0, BT)  # [BT]
        ml_sum += load_double(partial_ptr, tile, tiles)
        n_normal += load_double(partial_ptr + tiles, tile, tiles)
        pull_sum += load_double(partial_ptr + 2 * tiles, tile, tiles)
        pulled += load_double(partial_ptr + 3 * tiles, tile, tiles)
        push_sum += load_double(partial_ptr + 4 * tiles, tile, tiles)
        pushed += load_double(partial_ptr + 5 * tiles, tile, tiles)
    sums = (
        tl.sum(ml_sum, 0),
        tl.sum(n_normal, 0).to(tl.int64),
        tl.sum(pull_sum, 0),
        tl.sum(pulled, 0).to(tl.int64),
        tl.sum(push_sum, 0),
        tl.sum(pushed, 0).to(tl.int64),
    )
    term_ptrs = (l_total_ptr, l_ml_ptr, l_n_ptr, l_a_ptr)
    store_terms(term_ptrs, (n_normal_ptr, normal_violations_ptr, anomalous_violations_ptr), sums, lam, MEAN, PUSH)


@triton.jit
def upstream_gradient(g_ptr):
    """Return an upstream gradient; 0 for None, a term that was not used."""
    if g_ptr is None:
        return 0.0
    else:  # noqa: RET505, the compiler needs both branches of a test of None
        return tl.load(g_ptr)


@triton.jit
def spp_loss_backward_kernel(
    lp_ptr,  # [N] float32
    anomalous_ptr,  # [N] uint8, nonzero: anomalous
    b_n_ptr,  # scalar float32, as all of the forward's
    b_a_ptr,  # scalar float32
    n_normal_ptr,  # scalar int64
    normal_violations_ptr,  # scalar int64
    anomalous_violations_ptr,  # scalar int64
    g_total_ptr,  # scalar float32, upstream gradient of L; None counts as 0
    g_ml_ptr,  # scalar float32 or None
    g_n_ptr,  # scalar float32 or None
    g_a_ptr,  # scalar float32 or None
    d_lp_ptr,  # [N] float32
    rows,  # int32, N
    channels,  # int32
    lam,  # float32
    normalizer,  # float32
    NLL: tl.constexpr,
    MEAN: tl.constexpr,
    FOCAL: tl.constexpr,
    PUSH: tl.constexpr,
    BM: tl.constexpr,
):
    """Compute the gradient of each row, the sum of three terms; g_ml, g_n and g_a are the gradients of L_ml, L_n, L_a.

        normal rows:                 g_ml w dL_ml/dlp / n_normal
        normal with u <= b_n:        - g_n w / (normalizer n_violating)
        anomalous with u >= b_a:     + g_a w / (normalizer n_violating)

    Boundary and weights are constants. A term without an upstream gradient is left out.
    """
    start = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)  # [BM]
    inside = row < rows - start
    lp = tl.load(lp_ptr + start + row, mask=inside, other=0.0)  # [BM]
    is_anomalous = tl.load(anomalous_ptr + start + row, mask=inside, other=0) != 0  # [BM]
    is_normal = inside & ~is_anomalous  # [BM]
    w = 1.0
    if FOCAL:
        w = focal_weights(lp, is_anomalous)  # [BM]
    g_total = upstream_gradient(g_total_ptr)
    # where, not products: an infinite weight or slope of a row outside a term must not turn into 0 * inf.
    d_lp = tl.zeros([BM], tl.float32)
    if (g_total_ptr is not None) or (g_ml_ptr is not None):
        g_row = (g_total + upstream_gradient(g_ml_ptr)) / tl.maximum(tl.load(n_normal_ptr), 1).to(tl.float32)
        if NLL:
            of_row = -g_row * channels
        else:
            of_row = -g_row * sigmoid_of_minus(lp)
        d_lp += tl.where(is_normal, of_row * w, 0.0)
    u = tl.div_rn(lp, normalizer)  # [BM]
    if (g_total_ptr is not None) or (g_n_ptr is not None):
        g_row = (lam * g_total + upstream_gradient(g_n_ptr)) / normalizer
        if MEAN:
            g_row /= tl.maximum(tl.load(normal_violations_ptr), 1).to(tl.float32)
        d_lp -= tl.where(is_normal & (u <= tl.load(b_n_ptr)), g_row * w, 0.0)
    if PUSH and ((g_total_ptr is not None) or (g_a_ptr is not None)):
        g_row = (lam * g_total + upstream_gradient(g_a_ptr)) / normalizer
        if MEAN:
            g_row /= tl.maximum(tl.load(anomalous_violations_ptr), 1).to(tl.float32)
        d_lp += tl.where(is_anomalous & (u >= tl.load(b_a_ptr)), g_row * w, 0.0)
    tl.store(d_lp_ptr + start + row, d_lp, mask=inside)


def spp_loss_forward(
    lp: Tensor,  # [N] float32, contiguous
    anomalous: Tensor,  # [N] bool, contiguous
    channels: int,
    *,
    beta: float,
    tau: float,
    lam: float,
    normalizer: float,
    nll: bool,
    mean: bool,
    focal: bool,
    push: bool,
    edges: tuple[Tensor, Tensor] | None = None,
    tile: int = TILE,
    finish_tile: int = FINISH_TILE,
) -> Terms:
    """Return the loss and its boundary; `edges` (b_n, b_a; float32 scalars) replaces the boundary of these rows."""
    check_rows(lp, anomalous)
    rows = len(lp)
    terms = [torch.empty((), dtype=torch.float32, device=lp.device) for _ in range(4)]
    counts = [torch.empty((), dtype=torch.int64, device=lp.device) for _ in range(3)]
    mask = anomalous.view(torch.uint8)
    if edges is None and rows <= SMALL_LIMIT:
        b_n, b_a = (torch.empty((), dtype=torch.float32, device=lp.device) for _ in range(2))
        block = small_tile(rows)
        spp_loss_small_kernel[(1,)](
            lp,
            mask,
            *terms,
            b_n,
            b_a,
            *counts,
            rows,
            channels,
            float(tau),
            float(lam),
            float(normalizer),
            BETA=float(beta),
            NLL=nll,
            MEAN=mean,
            FOCAL=focal,
            PUSH=push,
            BM=block,
            num_warps=SMALL_TILES[block],
        )
        return Terms._make([*terms, b_n, b_a, *counts])
    b_n, b_a = boundary_forward(lp, anomalous, beta, tau, normalizer)[:2] if edges is None else edges
    tiles = max(triton.cdiv(rows, tile), 1)
    partial = torch.empty(6, tiles, dtype=torch.float32, device=lp.device)
    options = {"NLL": nll, "FOCAL": focal, "BM": tile, "num_warps": WARPS}
    spp_loss_partial_kernel[(tiles,)](lp, mask, b_n, b_a, partial, rows, channels, float(normalizer), **options)
    options = {"MEAN": mean, "PUSH": push, "BT": finish_tile, "num_warps": WARPS}
    spp_loss_finish_kernel[(1,)](partial, *terms, *counts, tiles, float(lam), **options)
    return Terms._make([*terms, b_n, b_a, *counts])


def spp_loss_backward(
    lp: Tensor,  # [N] float32, contiguous
    anomalous: Tensor,  # [N] bool, contiguous
    channels: int,
    terms: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # b_n, b_a and the three counts of the forward
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],  # of total, ml, normal, anomalous
    *,
    lam: float,
    normalizer: float,
    nll: bool,
    mean: bool,
    focal: bool,
    push: bool,
) -> Tensor:
    """Return d_lp, float32 [N]."""
    check_rows(lp, anomalous)
    d_lp = torch.empty_like(lp)
    if len(lp) > 0:
        spp_loss_backward_kernel[(triton.cdiv(len(lp), TILE),)](
            lp,
            anomalous.view(torch.uint8),
            *terms,
            *upstream,
            d_lp,
            len(lp),
            channels,
            float(lam),
            float(normalizer),
            NLL=nll,
            MEAN=mean,
            FOCAL=focal,
            PUSH=push,
            BM=TILE,
            num_warps=WARPS,
        )
    return d_lp
