"""The AllInOneBlock of FrEIA's main branch, re-stated from its formulas; PyPI has only version 0.2.

It differs from 0.2 in two places: the log-scale is clamp * tanh(a / clamp), and a hard permutation is an index that
moves channels, out[:, i] = v[:, index[i]], kept as int64 parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import FrEIA.framework as Ff
import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from .flows import subnet


class AllInOneBlock(InvertibleModule):
    """With SOFTPLUS, for rows [N, C]; the attributes that say what a block is have FrEIA's names."""

    def __init__(
        self, dims_in: Any, dims_c: Any = (), subnet_constructor: Callable[..., nn.Module] = subnet,
        affine_clamping: float = 2.0, permute_soft: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dims_in, dims_c)
        channels = dims_in[0][0]
        self.in_channels, self.clamp, self.input_rank = channels, affine_clamping, 0
        self.GIN, self.reverse_pre_permute, self.householder = False, False, 0
        self.condition_channels = sum(shape[0] for shape in dims_c)
        self.splits = [channels - channels // 2, channels // 2]
        self.softplus = nn.Softplus(beta=0.5)
        self.global_scale = nn.Parameter(torch.randn(1, channels) + 9)
        self.global_offset = nn.Parameter(0.3 * torch.randn(1, channels))
        if permute_soft:
            w, _ = torch.linalg.qr(torch.randn(channels, channels))
            self.w_perm = nn.Parameter(w.contiguous(), requires_grad=False)
            self.w_perm_inv = nn.Parameter(w.T.contiguous(), requires_grad=False)
            self.permute_function = nn.functional.linear
        else:
            index = torch.randperm(channels)
            self.w_perm = nn.Parameter(index, requires_grad=False)
            self.w_perm_inv = nn.Parameter(torch.argsort(index), requires_grad=False)
            self.permute_function = lambda v, p: v[:, p]
        self.subnet = subnet_constructor(self.splits[0] + self.condition_channels, 2 * self.splits[1])

    def global_scale_activation(self, parameter: Tensor) -> Tensor:
        return 0.1 * self.softplus(parameter)

    def _affine(self, x2: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        a_s, a_t = (0.1 * a).chunk(2, dim=1)
        s = self.clamp * torch.tanh(a_s / self.clamp)
        if rev:
            return (x2 - a_t) * torch.exp(-s), -s.sum(dim=1)
        return x2 * torch.exp(s) + a_t, s.sum(dim=1)

    def forward(
        self, x: tuple[Tensor, ...], c: Any = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        g = self.global_scale_activation(self.global_scale)
        v = x[0]
        if rev:
            v = (self.permute_function(v, self.w_perm_inv) - self.global_offset) / g
        x1, x2 = torch.split(v, self.splits, dim=1)
        x2, log_det = self._affine(x2, self.subnet(torch.cat([x1, *c], dim=1)), rev)
        v = torch.cat([x1, x2], dim=1)
        if not rev:
            v = self.permute_function(v * g + self.global_offset, self.w_perm)
        return (v,), log_det + (-1 if rev else 1) * torch.log(g).sum()

    def output_dims(self, input_dims: Any) -> Any:
        return input_dims


def freia_main_flow(
    channels: int, condition_channels: int, blocks: int, *, soft: bool, seed: int = 0
) -> Ff.SequenceINN:
    """A flow of such blocks, with parameters far enough from their start that every term matters."""
    torch.manual_seed(seed)
    flow = Ff.SequenceINN(channels)
    condition = {"cond": 0, "cond_shape": (condition_channels,)} if condition_channels else {}
    for _ in range(blocks):
        flow.append(AllInOneBlock, affine_clamping=1.9, permute_soft=soft, **condition)
    with torch.no_grad():
        for block in flow.module_list:
            for parameter in block.subnet.parameters():
                parameter *= 3
    return flow
