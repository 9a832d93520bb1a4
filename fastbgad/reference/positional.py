"""The positional condition p(h, w): a sinusoidal code of a patch's position in the feature map.

Source: the official BGAD and CFLOW-AD (a two-dimensional form of Vaswani et al., 2017).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def positional_encoding(channels: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the condition of every position of a map: [channels, height, width], computed in `dtype` on the CPU.

    With D = channels / 2 and f_i = exp(-2 i ln(10^4) / D), i = 0 .. D/2 - 1:

        p[2i]     = sin(w f_i)        p[2i + 1]     = cos(w f_i)          (channels 0 .. D-1: the column)
        p[D + 2i] = sin(h f_i)        p[D + 2i + 1] = cos(h f_i)          (channels D .. 2D-1: the row)

    `channels` must be a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"channels is {channels}; a two-dimensional sin/cos code needs a multiple of 4")
    half = channels // 2
    encoding = torch.empty(channels, height, width, dtype=dtype)
    rows = torch.arange(height, dtype=dtype)
    columns = torch.arange(width, dtype=dtype)
    for i in range(half // 2):
        frequency = torch.exp(torch.tensor(-2 * i * math.log(1e4) / half, dtype=dtype))
        encoding[2 * i] = torch.sin(columns * frequency)[None, :]
        encoding[2 * i + 1] = torch.cos(columns * frequency)[None, :]
        encoding[half + 2 * i] = torch.sin(rows * frequency)[:, None]
        encoding[half + 2 * i + 1] = torch.cos(rows * frequency)[:, None]
    return encoding
