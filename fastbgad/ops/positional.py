"""Positional condition as an object, so that the flow can use its structure instead of its 128 columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import FeatureError
from ..kernels.device_cache import DeviceCache, capturing


class PositionalRows:
    """Positional condition of N rows of a [height, width] feature map, without its [N, channels] values.

    p(h, w) is a code of the column followed by a code of the row, so the first layer of a subnet sees

        W1p p(h, w) + b1 = A[w] + B[h]

    exactly, with tables A [width, H] and B [height, H] that replace the product over all rows.

    Args:
        height, width: size of the map.
        index: int64 [N], flattened positions y * width + x. None means whole maps in raster order: N is then any
            multiple of height * width.
        channels: P, a multiple of 4.
    """

    def __init__(self, height: int, width: int, index: Tensor | None = None, channels: int = 128) -> None:
        if height < 1 or width < 1:
            raise FeatureError(f"a feature map of {height} x {width} has no positions")
        if channels < 4 or channels % 4:
            raise FeatureError(f"the positional condition has {channels} channels; it needs a multiple of 4")
        if index is not None and (index.dim() != 1 or index.dtype != torch.int64):
            raise FeatureError(f"index must be int64 [N], not {index.dtype} {tuple(index.shape)}")
        self.height = height
        self.width = width
        self.index = index
        self.channels = channels

    def check_rows(self, rows: int) -> None:
        """Raise `FeatureError` unless this object describes `rows` rows."""
        if self.index is not None:
            if len(self.index) != rows:
                raise FeatureError(f"{rows} feature rows but {len(self.index)} positions")
        elif rows % (self.height * self.width):
            raise FeatureError(
                f"{rows} feature rows are not a whole number of {self.height} x {self.width} maps; pass index= for a "
                "selection of rows"
            )

    def positions(self, rows: int, device: torch.device) -> Tensor:
        """Return the flattened position of every row, int64 [rows]."""
        if self.index is not None:
            return self.index.to(device)
        return torch.arange(rows, device=device) % (self.height * self.width)

    def codes(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the codes of all columns [width, channels / 2] and of all rows [height, channels / 2]."""
        half = self.channels // 2
        return axis_code(self.width, half, dtype, device), axis_code(self.height, half, dtype, device)

    def dense(self, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the condition as a tensor [rows, channels]."""
        column_code, row_code = self.codes(dtype, device)
        position = self.positions(rows, device)
        return torch.cat([column_code[position % self.width], row_code[position // self.width]], dim=1)


_codes = DeviceCache[Tensor](64)


def axis_code(length: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return interleaved sin(i f_k), cos(i f_k) with f_k = exp(-2 k ln(10^4) / channels): [length, channels].

    Computed in float64: in float32 the angle of a position 1000 patches away is off by 6e-5.
    """
    key = length, channels, dtype, device
    return _codes.get(key, device, lambda: _make_axis_code(*key))


def _make_axis_code(length: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # The CPU's sines, so that all devices see the same codes; but nothing can be copied from the host in a capture.
    maker = device if capturing(device) else torch.device("cpu")
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=maker)
    frequency = torch.exp(exponent * (-math.log(1e4) / channels))
    angle = torch.arange(length, dtype=torch.float64, device=maker)[:, None] * frequency
    return torch.stack([torch.sin(angle), torch.cos(angle)], dim=2).reshape(length, channels).to(device, dtype)
