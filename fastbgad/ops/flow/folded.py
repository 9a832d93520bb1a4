"""Weights of the portable flow with their constants folded in.

Constants are folded once per call: 0.1 into W2 and b2, g into W_perm, the offset through W_perm; a hard permutation
becomes an index. The positional condition becomes two small tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...flow_spec import CouplingWeights, FlowSpec
from ..positional import PositionalRows


class Folded(NamedTuple):
    """One coupling layer with its constants folded in.

    A chunk of rows is carried in T tiles of n rows, one tile per thread. States are channels first, [T, C, n], hidden
    activations rows first, [T, n, H]: so every product is quick on a CPU, and each half of a state is contiguous.
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
        """out = W_perm (g y + offset) of states [T, C, n]."""
        if self.w_out is None:
            assert self.moved is not None
            assert self.g_out is not None
            torch.index_select(y, 1, self.moved, out=out)
            return torch.addcmul(self.out_bias, out, self.g_out, out=out)
        return torch.bmm(self.w_out.expand(len(y), -1, -1), y, out=out).add_(self.out_bias)

    def permute_back(self, d_out: Tensor, out: Tensor) -> Tensor:
        """out = (W_perm diag(g))^T d_out: the gradient of y [T, C, n] from that of the layer's output."""
        if self.w_out is None:
            assert self.moved is not None
            torch.index_select(d_out, 1, torch.argsort(self.moved), out=out)
            return out.mul_(self.g[:, None])
        return torch.bmm(self.w_out.T.expand(len(d_out), -1, -1), d_out, out=out)


def global_affine_scale(global_scale: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return g [C] and its derivative with respect to the parameter [C]."""
    if kind == "SOFTPLUS":
        return 0.1 * torch.nn.functional.softplus(global_scale, beta=0.5), 0.1 * torch.sigmoid(0.5 * global_scale)
    if kind == "SIGMOID":
        sigmoid = torch.sigmoid(global_scale - 2)
        return 10 * sigmoid, 10 * sigmoid * (1 - sigmoid)
    g = torch.exp(global_scale)
    return g, g


def subnet_scale(spec: FlowSpec, like: Tensor) -> Tensor:
    """Return the factors of W2 and b2, [2 * C2]: FrEIA's 0.1; in the half of s also 2, and 1 / clamp if so scaled.

    tanh(a) = 2 sigmoid(2 a) - 1: PyTorch's sigmoid takes a seventh of the time of its tanh on a CPU.
    """
    scale = like.new_full((2 * spec.active_channels,), 0.1)
    scale[: spec.active_channels] *= 2 if spec.clamp_form == "tanh" else 2 / spec.clamp
    return scale


class PortableWeights(NamedTuple):
    """Prepared weights of the portable backend, for one type and one size of maps."""

    layers: list[Folded]
    map_size: tuple[int, int] | None  # height and width of the positional condition
    dtype: torch.dtype

    def serves(self, positions: PositionalRows | None, dtype: torch.dtype) -> bool:
        """Return whether they fit a condition and a type."""
        return self.dtype == dtype and self.map_size == map_size(positions)


def map_size(condition: PositionalRows | Tensor | None) -> tuple[int, int] | None:
    """Return height and width of a positional condition's map, None for any other condition."""
    return (condition.height, condition.width) if isinstance(condition, PositionalRows) else None


@torch.no_grad()
def fold_flow(
    layers: Sequence[CouplingWeights], spec: FlowSpec, positions: PositionalRows | None, dtype: torch.dtype
) -> PortableWeights:
    """Fold the constants of every layer; the cost does not depend on the number of rows.

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
    return PortableWeights(folded, map_size(positions), dtype)


def positional_tables(w1p: Tensor, b1: Tensor, codes: tuple[Tensor, Tensor]) -> Tensor:
    """Return A [width, H] above B [height, H], with W1p p(h, w) + b1 = A[w] + B[h]."""
    (width, half), height = codes[0].shape, len(codes[1])
    tables = w1p.new_empty(width + height, len(b1))
    torch.addmm(b1, codes[0], w1p[:, :half].T, out=tables[:width])
    torch.mm(codes[1], w1p[:, half:].T, out=tables[width:])
    return tables
