"""The explicit boundary on the device: an order statistic of the normal rows by radix selection, without a sort.

    b_n = (int(n_normal * beta)-th smallest lp of the normal rows) / normalizer,        b_a = b_n - tau

Every float32 becomes an unsigned integer whose order is that of `torch.sort`: NaN behind everything, -0.0 equal to
0.0. Four digits of 8 bits are settled from the top: count the digits of the rows still in question, take the digit
under which the wanted rank falls, keep the rows that have it. Only integers are counted, so the order in which
programs finish cannot change the result.

Up to SMALL_LIMIT rows one program holds all keys in registers and settles the four digits in one launch. Above it,
each digit is one launch that adds to hist[digit, :]; a launch finds the digits before its own by reading the
histograms of the launches before it. Reducing a histogram over processes between two launches (`reduce`) makes it the
order statistic of all their rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variant import Variant

# The tiles that one program holds in registers: rows -> warps. The next larger one spills in the loss kernel, and 4096
# rows are the chunk of a training step.
SMALL_TILES = {1024: 4, 4096: 16}
SMALL_LIMIT = max(SMALL_TILES)
# Rows of a tile of the histogram launches; a program counts several tiles rather than there being more programs.
TILE = 4096
WARPS = 8
MAX_PROGRAMS = 1024


@triton.jit
def ordered_key(x):
    """float32 -> uint32 in the order of torch.sort. Negative values turn around, NaN goes last, -0.0 becomes 0.0."""
    bits = x.to(tl.uint32, bitcast=True)
    key = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000)
    key = tl.where(x == 0, 0x80000000, key)
    return tl.where(x != x, 0xFFFFFFFF, key)


@triton.jit
def key_to_float(key):
    """The inverse of ordered_key."""
    bits = key ^ tl.where(key >> 31 != 0, 0x80000000, 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def wanted_rank(n_normal, BETA: tl.constexpr):
    """int(n_normal * beta): the product in float64, as Python computes it."""
    return (n_normal.to(tl.float64) * tl.full((), BETA, tl.float64)).to(n_normal.dtype)


@triton.jit
def pick_digit(
    counts,  # [256], how many rows have each digit
    rank,
):
    """The digit under which `rank` falls, and the rank among the rows that have it."""
    digits = tl.arange(0, 256)
    up_to = tl.cumsum(counts, 0)  # [256]
    # 255 where no row is left: there is no boundary then, but the digit must stay a digit.
    digit = tl.minimum(tl.sum((up_to <= rank).to(tl.int32), 0), 255)
    return digit, rank - tl.sum(tl.where(digits < digit, counts, 0), 0)


@triton.jit
def select_key(
    key,  # [BLOCK] uint32
    is_normal,  # [BLOCK] bool
    BETA: tl.constexpr,
):
    """The key of the wanted normal row and the number of normal rows, all rows being in this program."""
    n_normal = tl.sum(is_normal.to(tl.int32), 0)
    rank = wanted_rank(n_normal, BETA)
    chosen = tl.full((), 0, tl.uint32)
    remaining = is_normal
    for i in tl.static_range(4):
        digits = ((key >> (24 - 8 * i)) & 255).to(tl.int32)  # [BLOCK]
        counts = tl.histogram(digits, 256, mask=remaining)
        digit, rank = pick_digit(counts, rank)
        remaining = remaining & (digits == digit)
        chosen = (chosen << 8) | digit.to(tl.uint32)
    return chosen, n_normal


@triton.jit
def read_digits(hist, BETA: tl.constexpr, DIGITS: tl.constexpr):
    """The first DIGITS digits of the wanted key, and n_normal, from the histograms of earlier launches."""
    bins = tl.arange(0, 256)
    n_normal = tl.sum(tl.load(hist + bins), 0)  # int64
    rank = wanted_rank(n_normal, BETA)
    chosen = tl.full((), 0, tl.uint32)
    for i in tl.static_range(DIGITS):
        digit, rank = pick_digit(tl.load(hist + 256 * i + bins), rank)
        chosen = (chosen << 8) | digit.to(tl.uint32)
    return chosen, n_normal


@triton.jit
def boundary_of_key(key, n_normal, normalizer):
    """b_n. The division is the correctly rounded one: a row that lies on the boundary must violate."""
    return tl.where(n_normal > 0, tl.div_rn(key_to_float(key), normalizer), float("nan"))


@triton.jit
def boundary_small_kernel(
    lp,  # [N] float32
    anomalous,  # [N] uint8
    b_n,  # scalar float32
    b_a,  # scalar float32
    n_normal,  # scalar int64
    N,
    tau,
    normalizer,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.arange(0, BLOCK)
    x = tl.load(lp + rows, mask=rows < N, other=0.0)  # [BLOCK]
    is_normal = tl.load(anomalous + rows, mask=rows < N, other=1) == 0  # [BLOCK]
    key, count = select_key(ordered_key(x), is_normal, BETA)
    edge = boundary_of_key(key, count, normalizer)
    tl.store(b_n, edge)
    tl.store(b_a, edge - tau)
    tl.store(n_normal, count.to(tl.int64))


@triton.jit
def boundary_histogram_kernel(
    lp,  # [N] float32
    anomalous,  # [N] uint8
    hist,  # [4, 256] int64; row DIGIT is added to, the rows before it are read
    N,
    tiles,  # tiles per program
    BETA: tl.constexpr,
    DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    counts = tl.zeros([256], tl.int32)
    if DIGIT > 0:
        chosen, _ = read_digits(hist, BETA, DIGIT)
    first = tl.program_id(0).to(tl.int64) * tiles * BLOCK
    for tile in range(tiles):
        start = first + tile * BLOCK
        inside = offsets < N - start  # [BLOCK]
        x = tl.load(lp + start + offsets, mask=inside, other=0.0)  # [BLOCK]
        remaining = tl.load(anomalous + start + offsets, mask=inside, other=1) == 0  # [BLOCK]
        key = ordered_key(x)
        if DIGIT > 0:
            remaining = remaining & ((key >> (32 - 8 * DIGIT)) == chosen)
        counts += tl.histogram(((key >> (24 - 8 * DIGIT)) & 255).to(tl.int32), 256, mask=remaining)
    bins = tl.arange(0, 256)
    tl.atomic_add(hist + 256 * DIGIT + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def boundary_finish_kernel(
    hist,  # [4, 256] int64
    b_n,  # scalar float32
    b_a,  # scalar float32
    n_normal,  # scalar int64
    tau,
    normalizer,
    BETA: tl.constexpr,
):
    key, count = read_digits(hist, BETA, 4)
    edge = boundary_of_key(key, count, normalizer)
    tl.store(b_n, edge)
    tl.store(b_a, edge - tau)
    tl.store(n_normal, count)


def small_tile(rows: int) -> int:
    """The smallest tile that holds so many rows."""
    return min(tile for tile in SMALL_TILES if rows <= tile)


def boundary_forward(
    lp: Tensor,  # [N] float32, contiguous
    anomalous: Tensor,  # [N] bool, contiguous
    beta: float,
    tau: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """b_n, b_a (float32 scalars; NaN without a normal row) and n_normal (int64 scalar)."""
    rows = len(lp)
    if rows > SMALL_LIMIT:
        return boundary_finish(boundary_histograms(lp, anomalous, beta), beta, tau, normalizer)
    check_rows(lp, anomalous)
    b_n, b_a, n_normal = _scalars(lp.device)
    tile = small_tile(rows)
    boundary_small_kernel[(1,)](
        lp, anomalous.view(torch.uint8), b_n, b_a, n_normal, rows, float(tau), float(normalizer),
        BETA=float(beta), BLOCK=tile, num_warps=SMALL_TILES[tile],
    )  # fmt: skip
    return b_n, b_a, n_normal


def boundary_histograms(
    lp: Tensor,  # [N] float32, contiguous
    anomalous: Tensor,  # [N] bool, contiguous
    beta: float,
    *,
    reduce: Callable[[Tensor], object] | None = None,
    max_programs: int = MAX_PROGRAMS,
) -> Tensor:
    """[4, 256] int64: how many normal rows that share the digits chosen so far have each digit.

    `reduce` is called with each digit's [256] histogram before the next digit is counted; it adds in place what other
    processes counted.
    """
    check_rows(lp, anomalous)
    hist = torch.zeros(4, 256, dtype=torch.int64, device=lp.device)
    tiles = triton.cdiv(len(lp), TILE)
    programs = min(tiles, max_programs)
    for digit in range(4):
        if programs > 0:
            boundary_histogram_kernel[(programs,)](
                lp, anomalous.view(torch.uint8), hist, len(lp), triton.cdiv(tiles, programs),
                BETA=float(beta), DIGIT=digit, BLOCK=TILE, num_warps=WARPS,
            )  # fmt: skip
        if reduce is not None:
            reduce(hist[digit])
    return hist


def boundary_finish(
    hist: Tensor,  # [4, 256] int64
    beta: float,
    tau: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """b_n, b_a and n_normal from finished histograms."""
    b_n, b_a, n_normal = _scalars(hist.device)
    boundary_finish_kernel[(1,)](hist, b_n, b_a, n_normal, float(tau), float(normalizer), BETA=float(beta), num_warps=4)
    return b_n, b_a, n_normal


def variants() -> list[Variant]:
    """What ships, for the ahead-of-time gate."""
    rows = {"lp": "*fp32", "anomalous": "*u8", "N": "i32"}
    scalars = {"b_n": "*fp32", "b_a": "*fp32", "n_normal": "*i64", "tau": "fp32", "normalizer": "fp32"}
    small = [
        Variant(
            f"boundary_small {tile}", boundary_small_kernel, {**rows, **scalars}, {"BETA": 0.01, "BLOCK": tile}, warps
        )
        for tile, warps in SMALL_TILES.items()
    ]
    histogram = [
        Variant(
            f"boundary_histogram digit {digit}",
            boundary_histogram_kernel,
            {**rows, "hist": "*i64", "tiles": "i32"},
            {"BETA": 0.01, "DIGIT": digit, "BLOCK": TILE},
            WARPS,
        )
        for digit in range(4)
    ]
    finish = Variant("boundary_finish", boundary_finish_kernel, {"hist": "*i64", **scalars}, {"BETA": 0.01})
    return [*small, *histogram, finish]


def check_rows(lp: Tensor, anomalous: Tensor) -> None:
    """What the kernels take for granted."""
    assert lp.dim() == 1, "lp is [N]"
    assert lp.dtype == torch.float32, "lp is float32"
    assert anomalous.dtype == torch.bool, "the mask is bool"
    assert anomalous.shape == lp.shape, "one mask entry per row"
    assert lp.is_contiguous(), "lp is contiguous"
    assert anomalous.is_contiguous(), "the mask is contiguous"


def _scalars(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    b_n, b_a = (torch.empty((), dtype=torch.float32, device=device) for _ in range(2))
    return b_n, b_a, torch.empty((), dtype=torch.int64, device=device)
