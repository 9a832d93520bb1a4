"""What the portable flow prepares before any row is touched: folded weights, and where hidden biases come from.

Constants are folded once per call: 0.1 into W2 and b2, g into W_perm, the offset through W_perm. The positional
condition becomes two small tables, and a bias object per kind of condition turns them into the rows' hidden biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..flow_spec import CouplingWeights, FlowSpec
from .positional import PositionalRows


class Folded(NamedTuple):
    """One coupling layer with its constants folded in, transposed for row-major products."""

    w1x: Tensor  # [C1, H]
    bias: Tensor  # [H], b1; with tables it is part of A
    tables: Tensor | None  # [width + height, H], A above B
    w1p: Tensor | None  # [P, H], for a dense condition
    w2: Tensor  # [H, 2 * C2], scaled so that tanh and shift read it directly
    b2: Tensor  # [2 * C2]
    g: Tensor  # [C]
    w_out: Tensor  # [C, C], diag(g) W_perm^T
    out_bias: Tensor  # [C], W_perm offset
    log_g: Tensor  # scalar, sum(log g)


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


def fold(
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    positions: PositionalRows | None,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Folded]:
    """Folds the constants of every layer; the cost does not depend on the number of rows."""
    c1 = spec.passive_channels
    codes = positions.codes(dtype, device) if positions is not None else None
    folded = []
    for layer in layers:
        w1, b1, w2, b2, global_scale, offset, w_perm = (tensor.detach().to(dtype) for tensor in layer)
        g, _ = global_affine_scale(global_scale, spec.global_affine)
        scale = subnet_scale(spec, w2)
        tables = None
        if codes is not None:
            half = codes[0].shape[1]
            columns = torch.addmm(b1, codes[0], w1[:, c1 : c1 + half].T)
            tables = torch.cat([columns, codes[1] @ w1[:, c1 + half :].T])
        folded.append(
            Folded(
                w1x=w1[:, :c1].T.contiguous(),
                bias=b1,
                tables=tables,
                w1p=w1[:, c1:].T.contiguous() if tables is None and w1.shape[1] > c1 else None,
                w2=(scale[:, None] * w2).T.contiguous(),
                b2=scale * b2,
                g=g,
                w_out=(w_perm * g).T.contiguous(),
                out_bias=w_perm @ offset,
                log_g=torch.log(g).sum(),
            )
        )
    return folded


class RasterBias:
    """The hidden bias of whole maps in raster order: A[w] + B[h] by broadcasting, without any index."""

    def __init__(self, positions: PositionalRows) -> None:
        self.height, self.width = positions.height, positions.width

    def chunks(self, rows: int, chunk_rows: int) -> Iterator[tuple[int, int]]:
        """Chunks of whole maps where these are small, else of whole image rows within one map."""
        area = self.height * self.width
        if area <= chunk_rows:
            step = chunk_rows // area * area
            yield from ((start, min(start + step, rows)) for start in range(0, rows, step))
            return
        step = max(1, chunk_rows // self.width) * self.width
        for image in range(0, rows, area):
            yield from ((start, min(start + step, image + area)) for start in range(image, image + area, step))

    def fill(self, layer: Folded, start: int, stop: int, hidden: Tensor) -> Tensor:
        assert layer.tables is not None
        area = self.height * self.width
        columns, lines = layer.tables[: self.width], layer.tables[self.width :]
        first = start % area // self.width
        last = self.height if stop - start >= area else first + (stop - start) // self.width
        # [images, lines, width, H]; one image unless the chunk holds several whole maps
        view = hidden.view(-1, last - first, self.width, hidden.shape[1])
        torch.add(columns, lines[first:last, None], out=view[0])
        if len(view) > 1:
            view[1:] = view[0]
        return hidden


class GatheredBias:
    """The hidden bias of rows at arbitrary positions: A[w] + B[h] as one bag of two table rows per feature row."""

    def __init__(self, positions: PositionalRows, rows: int, device: torch.device) -> None:
        position = positions.positions(rows, device)
        self.bags = torch.stack([position % positions.width, position // positions.width + positions.width], dim=1)
        self.table_rows = positions.width + positions.height

    def chunks(self, rows: int, chunk_rows: int) -> Iterator[tuple[int, int]]:
        return ((start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows))

    def fill(self, layer: Folded, start: int, stop: int, hidden: Tensor | None) -> Tensor:
        assert layer.tables is not None
        return embedding_bag(self.bags[start:stop], layer.tables, mode="sum")

    def segments(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """For the gradient of the tables: feature rows ordered by the table row they used, and where each begins.

        A stable sort, so that the sums are taken in one order and the same seed gives the same bits.
        """
        used = self.bags[start:stop].reshape(-1)
        order = torch.argsort(used, stable=True)
        counts = torch.bincount(used, minlength=self.table_rows)
        return order // 2, torch.cumsum(counts, 0) - counts


class DenseBias:
    """The hidden bias of a dense condition [N, P], or of none."""

    def __init__(self, condition: Tensor | None) -> None:
        self.condition = condition

    def chunks(self, rows: int, chunk_rows: int) -> Iterator[tuple[int, int]]:
        return ((start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows))

    def fill(self, layer: Folded, start: int, stop: int, hidden: Tensor | None) -> Tensor:
        if self.condition is None or layer.w1p is None:
            if hidden is None:
                return layer.bias.repeat(stop - start, 1)
            return hidden.copy_(layer.bias.expand_as(hidden))
        if hidden is None:
            return torch.addmm(layer.bias, self.condition[start:stop], layer.w1p)
        return torch.addmm(layer.bias, self.condition[start:stop], layer.w1p, out=hidden)


Bias = RasterBias | GatheredBias | DenseBias
