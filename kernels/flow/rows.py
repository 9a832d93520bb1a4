"""The rows that go through a flow, and how they are cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .condition import DENSE, NONE, RASTER, TABLES
from .weights import FlowWeights, tile_channels


@dataclass(frozen=True)
class Rows:
    """The rows of a flow and their conditions.

    - features [R, C]; without an index the rows are all of them, in raster order of maps of height x width;
    - index [N] and gather: the rows are features[index], at position index modulo height * width;
    - index [N] without gather: the rows are all features (N = R) and the index is their positions;
    - condition [R, P]: dense, in place of positions; gathered along with the features.
    """

    features: Tensor
    height: int = 1
    width: int = 1
    index: Tensor | None = None
    gather: bool = False
    condition: Tensor | None = None

    @property
    def count(self) -> int:
        """Return N, the number of rows that go through the flow."""
        return len(self.features) if self.index is None else len(self.index)

    def slice(self, start: int, stop: int) -> Rows:
        """Return the rows from `start` to `stop`; rows of whole maps are then given by their index."""
        if self.index is None and self.condition is None and self.height * self.width > 1:
            index = torch.arange(start, min(stop, self.count), device=self.features.device)
            return replace(self, index=index, gather=True)
        if self.gather:
            assert self.index is not None
            return replace(self, index=self.index[start:stop])
        return replace(
            self,
            features=self.features[start:stop],
            index=None if self.index is None else self.index[start:stop],
            condition=None if self.condition is None else self.condition[start:stop],
        )


def tile_key(channels: int, operand: str, raster: bool = False) -> str:
    """Return the key of a flow in the tile sizes, e.g. "C64 float16 raster": channels of a tile and their type."""
    return f"C{2 * tile_channels(channels)} {operand}" + (" raster" if raster else "")


def is_raster(rows: Rows, weights: FlowWeights) -> bool:
    """Return whether the rows are whole maps with positions, which inference cuts into tiles of neighboring pixels."""
    return rows.index is None and rows.condition is None and bool(weights.tables.numel())


def condition_kind(rows: Rows, weights: FlowWeights, raster: bool) -> int:
    """Return COND: NONE, RASTER, TABLES or DENSE."""
    if rows.condition is not None:
        return int(DENSE)
    if not weights.tables.numel():
        return int(NONE)
    return int(RASTER) if raster else int(TABLES)


def raster_tile(rows: int) -> tuple[int, int]:
    """Return height and width of a tile of `rows` pixels: square or twice as wide as high, for the shortest edges."""
    width = 1 << ((rows.bit_length() - 1) + 1) // 2
    return rows // width, width
