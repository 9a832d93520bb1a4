"""What the portable flow prepares before any row is touched: folded weights, and where hidden biases come from.

Constants are folded once per call: 0.1 into W2 and b2, g into W_perm, the offset through W_perm; a hard permutation
becomes an index. The positional condition becomes two small tables, and a bias object per kind of condition turns them
into the rows' hidden biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ...flow_spec import CouplingWeights, FlowSpec
from ..positional import PositionalRows
from ..reused_memory import Block

# Shorter lanes make products too small to be quick.
FEWEST_LANE_ROWS = 128


class Chunk(NamedTuple):
    """Successive rows that go through all layers together, split evenly into lanes."""

    start: int
    stop: int
    lanes: int

    @staticmethod
    def of(start: int, stop: int, most_lanes: int) -> Chunk:
        """With the most lanes, up to `most_lanes`, that divide the rows and leave enough of them for each."""
        rows = stop - start
        most = max(1, min(most_lanes, rows // FEWEST_LANE_ROWS))
        return Chunk(start, stop, next(lanes for lanes in range(most, 0, -1) if rows % lanes == 0))

    @property
    def lane_rows(self) -> int:
        return (self.stop - self.start) // self.lanes


def row_chunks(rows: int, chunk_rows: int, lanes: int) -> Iterator[Chunk]:
    """Chunks of any rows; what does not divide into lanes at the end is a small chunk of its own."""
    even = rows - rows % lanes if rows >= lanes * FEWEST_LANE_ROWS else rows
    step = max(1, chunk_rows // lanes) * lanes
    yield from (Chunk.of(start, min(start + step, even), lanes) for start in range(0, even, step))
    if even < rows:
        yield Chunk(even, rows, 1)


class Folded(NamedTuple):
    """One coupling layer with its constants folded in.

    A chunk of rows is carried in L lanes of n rows, one lane per thread. States are channels first, [L, C, n], hidden
    activations rows first, [L, n, H]: so every product is quick on a CPU, and each half of a state is contiguous.
    """

    w1x: Tensor  # [C1, H]
    bias: Tensor  # [H], b1; with tables it is part of A
    tables: Tensor | None  # [width + height, H], A above B
    w1p: Tensor | None  # [P, H], for a dense condition
    w2: Tensor  # [2 * C2, H], scaled so that tanh and shift read it directly
    b2: Tensor  # [2 * C2, 1]
    g: Tensor  # [C]
    w_out: Tensor | None  # [C, C], W_perm diag(g); None for a hard permutation
    moved: Tensor | None  # [C] int64, for a hard permutation: output channel i is y's channel moved[i]
    g_out: Tensor | None  # [C, 1], g of those channels
    out_bias: Tensor  # [C, 1], W_perm offset
    log_g: Tensor  # scalar, sum(log g)

    def permute(self, y: Tensor, out: Tensor) -> Tensor:
        """out = W_perm (g y + offset) of states [L, C, n]."""
        if self.w_out is None:
            assert self.moved is not None
            assert self.g_out is not None
            torch.index_select(y, 1, self.moved, out=out)
            return torch.addcmul(self.out_bias, out, self.g_out, out=out)
        return torch.bmm(self.w_out.expand(len(y), -1, -1), y, out=out).add_(self.out_bias)

    def permute_back(self, d_out: Tensor, out: Tensor) -> Tensor:
        """out = (W_perm diag(g))^T d_out: the gradient of y [L, C, n] from that of the layer's output."""
        if self.w_out is None:
            assert self.moved is not None
            torch.index_select(d_out, 1, torch.argsort(self.moved), out=out)
            return out.mul_(self.g[:, None])
        return torch.bmm(self.w_out.T.expand(len(d_out), -1, -1), d_out, out=out)


def global_affine_scale(global_scale: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """g [C] and its derivative with respect to the parameter [C]."""
    if kind == "SOFTPLUS":
        return 0.1 * torch.nn.functional.softplus(global_scale, beta=0.5), 0.1 * torch.sigmoid(0.5 * global_scale)
    if kind == "SIGMOID":
        sigmoid = torch.sigmoid(global_scale - 2)
        return 10 * sigmoid, 10 * sigmoid * (1 - sigmoid)
    g = torch.exp(global_scale)
    return g, g


def subnet_scale(spec: FlowSpec, like: Tensor) -> Tensor:
    """What W2 and b2 are multiplied by, [2 * C2]: FrEIA's 0.1; in the half of s also 2, and 1 / clamp if so scaled.

    tanh(a) = 2 sigmoid(2 a) - 1: PyTorch's sigmoid takes a seventh of the time of its tanh on a CPU.
    """
    scale = like.new_full((2 * spec.active_channels,), 0.1)
    scale[: spec.active_channels] *= 2 if spec.clamp_form == "tanh" else 2 / spec.clamp
    return scale


class FoldedFlow(NamedTuple):
    """The layers of a flow with their constants folded in, for one type and one size of maps."""

    layers: list[Folded]
    map_size: tuple[int, int] | None  # height and width of the positional condition
    dtype: torch.dtype

    def serves(self, positions: PositionalRows | None, dtype: torch.dtype) -> bool:
        return self.dtype == dtype and self.map_size == map_size(positions)


def map_size(condition: PositionalRows | Tensor | None) -> tuple[int, int] | None:
    return (condition.height, condition.width) if isinstance(condition, PositionalRows) else None


@torch.no_grad()
def fold_flow(
    layers: Sequence[CouplingWeights], spec: FlowSpec, positions: PositionalRows | None, dtype: torch.dtype
) -> FoldedFlow:
    """Folds the constants of every layer; the cost does not depend on the number of rows.

    The result is a snapshot: later changes of the weights do not reach it.
    """
    device = layers[0].w1.device
    c1 = spec.passive_channels
    codes = positions.codes(dtype, device) if positions is not None else None
    small = zip(*((layer.b2, layer.global_scale, layer.global_offset) for layer in layers), strict=True)
    b2, global_scale, offset = (torch.stack([t.detach() for t in tensors]).to(dtype) for tensors in small)
    g, _ = global_affine_scale(global_scale, spec.global_affine)
    scale, log_g = subnet_scale(spec, b2), torch.log(g).sum(dim=1)
    b2 = (scale * b2)[:, :, None]
    folded = []
    for layer, b2_, g_, offset_, log_g_ in zip(layers, b2, g, offset, log_g, strict=True):
        w1, b1, w2, w_perm = (t.detach().to(dtype) for t in (layer.w1, layer.b1, layer.w2, layer.w_perm))
        tables = positional_tables(w1[:, c1:], b1, codes) if codes is not None else None
        moved = w_perm.argmax(dim=1) if spec.hard_permutation else None
        folded.append(
            Folded(
                w1x=w1[:, :c1].T.contiguous(),
                bias=b1,
                tables=tables,
                w1p=w1[:, c1:].T.contiguous() if tables is None and w1.shape[1] > c1 else None,
                w2=scale[:, None] * w2,
                b2=b2_,
                g=g_,
                w_out=torch.mul(w_perm, g_, out=w_perm.new_empty(w_perm.shape)) if moved is None else None,
                moved=moved,
                g_out=g_[moved, None] if moved is not None else None,
                out_bias=(torch.mv(w_perm, offset_) if moved is None else offset_[moved])[:, None],
                log_g=log_g_,
            )
        )
    return FoldedFlow(folded, map_size(positions), dtype)


def positional_tables(w1p: Tensor, b1: Tensor, codes: tuple[Tensor, Tensor]) -> Tensor:
    """A [width, H] above B [height, H], with W1p p(h, w) + b1 = A[w] + B[h]."""
    (width, half), height = codes[0].shape, len(codes[1])
    tables = w1p.new_empty(width + height, len(b1))
    torch.addmm(b1, codes[0], w1p[:, :half].T, out=tables[:width])
    torch.mm(codes[1], w1p[:, half:].T, out=tables[width:])
    return tables


class RasterBias:
    """The hidden bias of whole maps in raster order: A[w] + B[h] by broadcasting, without any index."""

    def __init__(self, positions: PositionalRows) -> None:
        self.height, self.width = positions.height, positions.width

    def chunks(self, rows: int, chunk_rows: int, lanes: int) -> Iterator[Chunk]:
        """Chunks of whole maps where these are small, else of whole image rows within one map."""
        area = self.height * self.width
        if area <= chunk_rows:
            step = chunk_rows // area * area
            yield from (Chunk.of(start, min(start + step, rows), lanes) for start in range(0, rows, step))
            return
        step = max(1, chunk_rows // self.width) * self.width
        for image in range(0, rows, area):
            end = image + area
            yield from (Chunk.of(start, min(start + step, end), lanes) for start in range(image, end, step))

    def fill(self, layer: Folded, chunk: Chunk, hidden: Tensor) -> None:
        """Writes the bias of every row of the chunk into `hidden` [L, n, H]."""
        assert layer.tables is not None
        area, rows = self.height * self.width, chunk.stop - chunk.start
        columns, lines = layer.tables[: self.width], layer.tables[self.width :]
        first = chunk.start % area // self.width
        last = self.height if rows >= area else first + rows // self.width
        # [images, lines, width, H]; one image unless the chunk holds several whole maps
        view = hidden.view(-1, last - first, self.width, hidden.shape[-1])
        torch.add(columns, lines[first:last, None], out=view[0])
        if len(view) > 1:
            view[1:] = view[0]


class GatheredBias:
    """The hidden bias of rows at arbitrary positions: A[w] + B[h].

    Where a map has no more places than there are rows, the bias of each place is added up once and a row copies one of
    them; else each row adds one row of A and one of B.
    """

    def __init__(self, positions: PositionalRows, rows: int, device: torch.device) -> None:
        self.height, self.width = positions.height, positions.width
        self.place = positions.positions(rows, device)
        self.by_place = self.height * self.width <= rows

    def chunks(self, rows: int, chunk_rows: int, lanes: int) -> Iterator[Chunk]:
        return row_chunks(rows, chunk_rows, lanes)

    def fill(self, layer: Folded, chunk: Chunk, hidden: Tensor) -> None:
        assert layer.tables is not None
        place, rows = self.place[chunk.start : chunk.stop], hidden.view(-1, hidden.shape[-1])
        columns, lines = layer.tables.split([self.width, self.height])
        if self.by_place:
            block = Block(self.height * self.width * rows.shape[1], columns)
            table = block.view(self.height, self.width, rows.shape[1])
            torch.add(columns, lines[:, None], out=table)
            torch.index_select(table.flatten(0, 1).to(rows.dtype), 0, place, out=rows)
        else:
            block = Block(rows.numel(), hidden)
            columns, lines = columns.to(rows.dtype), lines.to(rows.dtype)
            torch.index_select(columns, 0, place % self.width, out=rows)
            rows += torch.index_select(lines, 0, place // self.width, out=block.view(*rows.shape))

    def segments(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """For `sum_segments`: the chunk's rows ordered by what they read, and where each piece of it begins.

        A stable sort, so that the sums are taken in one order and the same seed gives the same bits.
        """
        place, pieces = self.place[chunk.start : chunk.stop], self.width + self.height
        used = torch.cat([place % self.width, place // self.width + self.width])
        order = torch.argsort(used, stable=True)
        counts = torch.bincount(used, minlength=pieces)
        return order % (chunk.stop - chunk.start), torch.cumsum(counts, 0) - counts

    def sum_segments(self, d_hidden: Tensor, segments: tuple[Tensor, Tensor]) -> Tensor:
        """The gradient of the tables [width + height, H] from that of the rows [L * n, H]."""
        rows, offsets = segments
        return embedding_bag(rows, d_hidden, offsets, mode="sum")


class DenseBias:
    """The hidden bias of a dense condition [N, P], or of none."""

    def __init__(self, condition: Tensor | None) -> None:
        self.condition = condition

    def chunks(self, rows: int, chunk_rows: int, lanes: int) -> Iterator[Chunk]:
        return row_chunks(rows, chunk_rows, lanes)

    def fill(self, layer: Folded, chunk: Chunk, hidden: Tensor) -> None:
        if self.condition is None or layer.w1p is None:
            hidden.copy_(layer.bias.expand_as(hidden))
        else:
            condition = self.condition[chunk.start : chunk.stop]
            torch.addmm(layer.bias, condition, layer.w1p, out=hidden.view(-1, hidden.shape[-1]))


Bias = RasterBias | GatheredBias | DenseBias


def hidden_bias_of(positions: PositionalRows | None, dense: Tensor | None, x: Tensor) -> Bias:
    """Where the hidden biases of the rows of x [N, C] come from, for inference."""
    if positions is None:
        return DenseBias(dense)
    if positions.index is None:
        return RasterBias(positions)
    return GatheredBias(positions, len(x), x.device)
