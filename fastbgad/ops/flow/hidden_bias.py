"""Hidden biases of the rows of the portable flow, by kind of condition, and the chunks that rows are split into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..positional import PositionalRows
from ..reused_memory import Block
from .folded import Folded

# Shorter tiles make products too small to be quick.
FEWEST_TILE_ROWS = 128


class Chunk(NamedTuple):
    """Successive rows that go through all layers together, split evenly into tiles."""

    start: int
    stop: int
    tiles: int

    @staticmethod
    def of(start: int, stop: int, most_tiles: int) -> Chunk:
        """Return a chunk with the most tiles, up to `most_tiles`, that divide the rows and leave enough for each."""
        rows = stop - start
        most = max(1, min(most_tiles, rows // FEWEST_TILE_ROWS))
        return Chunk(start, stop, next(tiles for tiles in range(most, 0, -1) if rows % tiles == 0))

    @property
    def tile_rows(self) -> int:
        """Number of rows of each tile."""
        return (self.stop - self.start) // self.tiles


def row_chunks(rows: int, chunk_rows: int, tiles: int) -> Iterator[Chunk]:
    """Yield chunks of any rows; what does not divide into tiles at the end is a small chunk of its own."""
    even = rows - rows % tiles if rows >= tiles * FEWEST_TILE_ROWS else rows
    step = max(1, chunk_rows // tiles) * tiles
    yield from (Chunk.of(start, min(start + step, even), tiles) for start in range(0, even, step))
    if even < rows:
        yield Chunk(even, rows, 1)


class RasterBias:
    """Hidden bias of whole maps in raster order: A[w] + B[h] by broadcasting, without any index."""

    def __init__(self, positions: PositionalRows) -> None:
        self.height, self.width = positions.height, positions.width

    def chunks(self, rows: int, chunk_rows: int, tiles: int) -> Iterator[Chunk]:
        """Yield chunks of whole maps where these are small, else of whole lines within one map."""
        area = self.height * self.width
        if area <= chunk_rows:
            step = chunk_rows // area * area
            yield from (Chunk.of(start, min(start + step, rows), tiles) for start in range(0, rows, step))
            return
        step = max(1, chunk_rows // self.width) * self.width
        for image in range(0, rows, area):
            end = image + area
            yield from (Chunk.of(start, min(start + step, end), tiles) for start in range(image, end, step))

    def fill(self, layer: Folded, chunk: Chunk, hidden: Tensor) -> None:
        """Write the bias of every row of a chunk into `hidden` [T, n, H]."""
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
    """Hidden bias of rows at arbitrary positions: A[w] + B[h].

    Where a map has no more positions than there are rows, the bias of each position is added up once and a row copies
    one of them; else each row adds one row of A and one of B.
    """

    def __init__(self, positions: PositionalRows, rows: int, device: torch.device) -> None:
        self.height, self.width = positions.height, positions.width
        self.position = positions.positions(rows, device)
        self.by_position = self.height * self.width <= rows

    def chunks(self, rows: int, chunk_rows: int, tiles: int) -> Iterator[Chunk]:
        """Yield chunks of any rows."""
        return row_chunks(rows, chunk_rows, tiles)

    def fill(self, layer: Folded, chunk: Chunk, hidden: Tensor) -> None:
        """Write the bias of every row of a chunk into `hidden` [T, n, H]."""
        assert layer.tables is not None
        position, rows = self.position[chunk.start : chunk.stop], hidden.view(-1, hidden.shape[-1])
        columns, lines = layer.tables.split([self.width, self.height])
        if self.by_position:
            block = Block(self.height * self.width * rows.shape[1], columns)
            table = block.view(self.height, self.width, rows.shape[1])
            torch.add(columns, lines[:, None], out=table)
            torch.index_select(table.flatten(0, 1).to(rows.dtype), 0, position, out=rows)
        else:
            block = Block(rows.numel(), hidden)
            columns, lines = columns.to(rows.dtype), lines.to(rows.dtype)
            torch.index_select(columns, 0, position % self.width, out=rows)
            rows += torch.index_select(lines, 0, position // self.width, out=block.view(*rows.shape))

    def segments(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return a chunk's rows ordered by the table row that they read, and where each table row begins.

        A stable sort, so that the sums are taken in one order and the same seed gives the same bits.
        """
        position, pieces = self.position[chunk.start : chunk.stop], self.width + self.height
        used = torch.cat([position % self.width, position // self.width + self.width])
        order = torch.argsort(used, stable=True)
        counts = torch.bincount(used, minlength=pieces)
        return order % (chunk.stop - chunk.start), torch.cumsum(counts, 0) - counts

    def sum_segments(self, d_hidden: Tensor, segments: tuple[Tensor, Tensor]) -> Tensor:
        """Return the gradient of the tables [width + height, H] from that of the rows [T * n, H]."""
        rows, offsets = segments
        return embedding_bag(rows, d_hidden, offsets, mode="sum")


class DenseBias:
    """Hidden bias of a dense condition [N, P], or of none."""

    def __init__(self, condition: Tensor | None) -> None:
        self.condition = condition

    def chunks(self, rows: int, chunk_rows: int, tiles: int) -> Iterator[Chunk]:
        """Yield chunks of any rows."""
        return row_chunks(rows, chunk_rows, tiles)

    def fill(self, layer: Folded, chunk: Chunk, hidden: Tensor) -> None:
        """Write the bias of every row of a chunk into `hidden` [T, n, H]."""
        if self.condition is None or layer.w1p is None:
            hidden.copy_(layer.bias.expand_as(hidden))
        else:
            condition = self.condition[chunk.start : chunk.stop]
            torch.addmm(layer.bias, condition, layer.w1p, out=hidden.view(-1, hidden.shape[-1]))


Bias = RasterBias | GatheredBias | DenseBias


def hidden_bias_of(positions: PositionalRows | None, dense: Tensor | None, x: Tensor) -> Bias:
    """Return the source of the hidden biases of the rows x [N, C], for inference."""
    if positions is None:
        return DenseBias(dense)
    if positions.index is None:
        return RasterBias(positions)
    return GatheredBias(positions, len(x), x.device)
