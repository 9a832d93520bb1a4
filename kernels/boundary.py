"""The explicit boundary on the device: an order statistic of the normal rows by radix selection, without a sort.

    b_n = (int(n_normal * beta)-th smallest lp of the normal rows) / normalizer,        b_a = b_n - tau

Each float32 is mapped to an unsigned integer (a key) whose order is that of `torch.sort`: NaN comes last, -0.0 equals
0.0. The wanted key is found in four digits of 8 bits, the highest digit first: count the digits of the remaining rows,
choose the digit that the wanted rank falls under, keep the rows that have it. Only integers are counted, so the order
in which programs finish cannot change the result.

Up to SMALL_LIMIT rows, one program holds all keys in registers and finds the four digits in one launch. Above it, each
digit is one launch that adds to hist[digit, :]; a launch finds the digits before its own by reading the histograms of
the launches before it. Reducing a histogram over processes between two launches (`reduce`) gives the order statistic of
all their rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles that one program holds in registers: rows -> warps. The next larger one would spill in the loss kernel, and a
# training step has a chunk of 4096 rows.
SMALL_TILES = {1024: 4, 4096: 16}
SMALL_LIMIT = max(SMALL_TILES)
# Rows of a tile of the histogram launches. Beyond MAX_PROGRAMS a program counts several tiles.
TILE = 4096
WARPS = 8
MAX_PROGRAMS = 1024


@triton.jit
def ordered_key(x):
    """Map float32 to uint32 in the order of torch.sort: negative values reversed, NaN last, -0.0 equal to 0.0."""
    bits = x.to(tl.uint32, bitcast=True)
    key = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000)
    key = tl.where(x == 0, 0x80000000, key)
    return tl.where(x != x, 0xFFFFFFFF, key)


@triton.jit
def key_to_float(key):
    """Invert `ordered_key`."""
    bits = key ^ tl.where(key >> 31 != 0, 0x80000000, 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def wanted_rank(n_normal, BETA: tl.constexpr):
    """Return int(n_normal * beta), multiplied in float64 as Python does."""
    return (n_normal.to(tl.float64) * tl.full((), BETA, tl.float64)).to(n_normal.dtype)


@triton.jit
def pick_digit(
    counts,  # [256] int, number of rows with each digit
    rank,  # int
):
    """Return the digit that `rank` falls under, and the rank among the rows that have this digit."""
    digits = tl.arange(0, 256)  # [256]
    up_to = tl.cumsum(counts, 0)  # [256]
    # Without a remaining row there is no boundary, but the digit must not exceed 255.
    digit = tl.minimum(tl.sum((up_to <= rank).to(tl.int32), 0), 255)
    return digit, rank - tl.sum(tl.where(digits < digit, counts, 0), 0)


@triton.jit
def select_key(
    key,  # [BM] uint32
    is_normal,  # [BM] bool
    BETA: tl.constexpr,
):
    """Return the wanted key and the number of normal rows, where this program holds all rows."""
    n_normal = tl.sum(is_normal.to(tl.int32), 0)
    rank = wanted_rank(n_normal, BETA)
    chosen = tl.full((), 0, tl.uint32)
    remaining = is_normal
    for i in tl.static_range(4):
        digits = ((key >> (24 - 8 * i)) & 255).to(tl.int32)  # [BM]
        counts = tl.histogram(digits, 256, mask=remaining)  # [256]
        digit, rank = pick_digit(counts, rank)
        remaining = remaining & (digits == digit)
        chosen = (chosen << 8) | digit.to(tl.uint32)
    return chosen, n_normal


@triton.jit
def read_digits(
    hist_ptr,  # [4, 256] int64
    BETA: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """Return the first DIGITS digits of the wanted key, and n_normal, from the histograms of earlier launches."""
    bins = tl.arange(0, 256)  # [256]
    n_normal = tl.sum(tl.load(hist_ptr + bins), 0)  # int64
    rank = wanted_rank(n_normal, BETA)
    chosen = tl.full((), 0, tl.uint32)
    for i in tl.static_range(DIGITS):
        digit, rank = pick_digit(tl.load(hist_ptr + 256 * i + bins), rank)
        chosen = (chosen << 8) | digit.to(tl.uint32)
    return chosen, n_normal


@triton.jit
def boundary_of_key(key, n_normal, normalizer):
    """Return b_n. The division is correctly rounded: a row that lies on the boundary must violate it."""
    return tl.where(n_normal > 0, tl.div_rn(key_to_float(key), normalizer), float("nan"))


@triton.jit
def boundary_small_kernel(
    lp_ptr,  # [N] float32
    anomalous_ptr,  # [N] uint8, nonzero: anomalous
    b_n_ptr,  # scalar float32
    b_a_ptr,  # scalar float32
    n_normal_ptr,  # scalar int64
    rows,  # int32, N
    tau,  # float32
    normalizer,  # float32
    BETA: tl.constexpr,
    BM: tl.constexpr,
):
    """Compute the boundary of at most BM rows in one program."""
    row = tl.arange(0, BM)  # [BM]
    lp = tl.load(lp_ptr + row, mask=row < rows, other=0.0)  # [BM]
    is_normal = tl.load(anomalous_ptr + row, mask=row < rows, other=1) == 0  # [BM]
    key, count = select_key(ordered_key(lp), is_normal, BETA)
    b_n = boundary_of_key(key, count, normalizer)
    tl.store(b_n_ptr, b_n)
    tl.store(b_a_ptr, b_n - tau)
    tl.store(n_normal_ptr, count.to(tl.int64))


@triton.jit
def boundary_histogram_kernel(
    lp_ptr,  # [N] float32
    anomalous_ptr,  # [N] uint8, nonzero: anomalous
    hist_ptr,  # [4, 256] int64; row DIGIT is added to, the rows before it are read
    rows,  # int32, N
    tiles,  # int32, tiles of each program
    BETA: tl.constexpr,
    DIGIT: tl.constexpr,
    BM: tl.constexpr,
):
    """Count one digit of the normal rows that share the digits chosen before."""
    offsets = tl.arange(0, BM)  # [BM]
    counts = tl.zeros([256], tl.int32)
    if DIGIT > 0:
        chosen, _ = read_digits(hist_ptr, BETA, DIGIT)
    first = tl.program_id(0).to(tl.int64) * tiles * BM
    for tile in range(tiles):
        start = first + tile * BM
        inside = offsets < rows - start  # [BM]
        lp = tl.load(lp_ptr + start + offsets, mask=inside, other=0.0)  # [BM]
        remaining = tl.load(anomalous_ptr + start + offsets, mask=inside, other=1) == 0  # [BM]
        key = ordered_key(lp)  # [BM]
        if DIGIT > 0:
            remaining = remaining & ((key >> (32 - 8 * DIGIT)) == chosen)
        counts += tl.histogram(((key >> (24 - 8 * DIGIT)) & 255).to(tl.int32), 256, mask=remaining)
    bins = tl.arange(0, 256)  # [256]
    tl.atomic_add(hist_ptr + 256 * DIGIT + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def boundary_finish_kernel(
    hist_ptr,  # [4, 256] int64
    b_n_ptr,  # scalar float32
    b_a_ptr,  # scalar float32
    n_normal_ptr,  # scalar int64
    tau,  # float32
    normalizer,  # float32
    BETA: tl.constexpr,
):
    """Compute the boundary from the finished histograms."""
    key, count = read_digits(hist_ptr, BETA, 4)
    b_n = boundary_of_key(key, count, normalizer)
    tl.store(b_n_ptr, b_n)
    tl.store(b_a_ptr, b_n - tau)
    tl.store(n_normal_ptr, count)


def small_tile(rows: int) -> int:
    """Return the smallest tile that holds this number of rows."""
    return min(tile for tile in SMALL_TILES if rows <= tile)


def boundary_forward(
    lp: Tensor,  # [N] float32, contiguous
    anomalous: Tensor,  # [N] bool, contiguous
    beta: float,
    tau: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return b_n, b_a (float32 scalars; NaN without a normal row) and n_normal (int64 scalar)."""
    rows = len(lp)
    if rows > SMALL_LIMIT:
        return boundary_finish(boundary_histograms(lp, anomalous, beta), beta, tau, normalizer)
    check_rows(lp, anomalous)
    b_n, b_a, n_normal = _scalars(lp.device)
    tile = small_tile(rows)
    boundary_small_kernel[(1,)](
        lp,
        anomalous.view(torch.uint8),
        b_n,
        b_a,
        n_normal,
        rows,
        float(tau),
        float(normalizer),
        BETA=float(beta),
        BM=tile,
        num_warps=SMALL_TILES[tile],
    )
    return b_n, b_a, n_normal


def boundary_histograms(
    lp: Tensor,  # [N] float32, contiguous
    anomalous: Tensor,  # [N] bool, contiguous
    beta: float,
    *,
    reduce: Callable[[Tensor], object] | None = None,
    max_programs: int = MAX_PROGRAMS,
) -> Tensor:
    """Return the counts of each digit among the normal rows that share the digits chosen before, int64 [4, 256].

    `reduce` is called with each digit's [256] histogram before the next digit is counted; it adds the counts of other
    processes in place.
    """
    check_rows(lp, anomalous)
    hist = torch.zeros(4, 256, dtype=torch.int64, device=lp.device)
    tiles = triton.cdiv(len(lp), TILE)
    programs = min(tiles, max_programs)
    for digit in range(4):
        if programs > 0:
            boundary_histogram_kernel[(programs,)](
                lp,
                anomalous.view(torch.uint8),
                hist,
                len(lp),
                triton.cdiv(tiles, programs),
                BETA=float(beta),
                DIGIT=digit,
                BM=TILE,
                num_warps=WARPS,
            )
        if reduce is not None:
            reduce(hist[digit])
    return hist


def boundary_finish(
    hist: Tensor,  # [4, 256] int64
    beta: float,
    tau: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return b_n, b_a and n_normal from finished histograms."""
    b_n, b_a, n_normal = _scalars(hist.device)
    boundary_finish_kernel[(1,)](hist, b_n, b_a, n_normal, float(tau), float(normalizer), BETA=float(beta), num_warps=4)
    return b_n, b_a, n_normal


def check_rows(lp: Tensor, anomalous: Tensor) -> None:
    """Assert what the kernels rely on."""
    assert lp.dim() == 1, "lp is [N]"
    assert lp.dtype == torch.float32, "lp is float32"
    assert anomalous.dtype == torch.bool, "the mask is bool"
    assert anomalous.shape == lp.shape, "one mask entry per row"
    assert lp.is_contiguous(), "lp is contiguous"
    assert anomalous.is_contiguous(), "the mask is contiguous"


def _scalars(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    b_n, b_a = (torch.empty((), dtype=torch.float32, device=device) for _ in range(2))
    return b_n, b_a, torch.empty((), dtype=torch.int64, device=device)
