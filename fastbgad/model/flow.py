"""The conditional normalizing flow as a module, with FrEIA's parameter names.

The `state_dict` of a FrEIA `SequenceINN` of `AllInOneBlock`s loads into `ConditionalFlow` key for key, and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ..flow_spec import CouplingWeights, FlowSpec
from ..ops import FlowOutput, Impl, MatmulPrecision, PositionalRows, flow_forward, flow_inverse
from ..ops.dispatch import renamed_precision
from ..ops.flow.prepared_weights import PreparedWeights


class CouplingLayer(nn.Module):
    """The tensors of one coupling layer under FrEIA's names; `ConditionalFlow` does the computing."""

    w_perm: Tensor

    def __init__(self, spec: FlowSpec, generator: torch.Generator | None) -> None:
        super().__init__()
        channels = spec.channels
        # The parameter whose activation is 1, as FrEIA starts with global_affine_init = 1.
        start = {"SOFTPLUS": 2 * math.log(math.expm1(5)), "SIGMOID": 2 - math.log(9), "EXP": 0.0}[spec.global_affine]
        self.global_scale: nn.Parameter = nn.Parameter(torch.full((1, channels), start))
        self.global_offset: nn.Parameter = nn.Parameter(torch.zeros(1, channels))
        draw = _random_permutation if spec.hard_permutation else _random_rotation
        # Contiguous: a QR decomposition leaves its columns side by side, and the kernels read rows.
        w_perm = torch.eye(channels) if generator is None else draw(channels, generator).float().contiguous()
        self.w_perm = nn.Parameter(w_perm, requires_grad=False)
        self.w_perm_inv: nn.Parameter = nn.Parameter(w_perm.T.contiguous(), requires_grad=False)
        self.subnet: nn.Sequential = nn.Sequential(
            _linear(spec.passive_channels + spec.condition_channels, spec.hidden_channels, generator),
            nn.ReLU(),
            _linear(spec.hidden_channels, 2 * spec.active_channels, generator),
        )

    def weights(self) -> CouplingWeights:
        """Return the layer's tensors as the operations want them."""
        first, second = cast(nn.Linear, self.subnet[0]), cast(nn.Linear, self.subnet[2])
        scale, offset = self.global_scale.squeeze(0), self.global_offset.squeeze(0)
        return CouplingWeights(first.weight, first.bias, second.weight, second.bias, scale, offset, self.w_perm)


class ConditionalFlow(nn.Module):
    """A normalizing flow over patch features [N, C], conditioned on their position (Yao et al., CVPR 2023).

    Args:
        spec: the shape of the flow.
        seed: seed of the initial weights; the global random state is left alone. None for a flow that is about to be
            loaded: zeros and no permutation at once, where drawing rotations takes seconds at 2048 channels.
        impl: which implementation of the operations to use, see `fastbgad.ops`.
        matmul_precision: operands of matrix products, see `fastbgad.ops.flow_forward`.
        precision: deprecated name of matmul_precision.
    """

    def __init__(
        self,
        spec: FlowSpec,
        *,
        seed: int | None = 0,
        impl: Impl = "auto",
        matmul_precision: MatmulPrecision = "auto",
        precision: MatmulPrecision | None = None,
    ) -> None:
        super().__init__()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.spec = spec
        self.impl: Impl = impl
        self.matmul_precision: MatmulPrecision = renamed_precision(matmul_precision, precision)
        self._prepared: PreparedWeights | None = None
        self.module_list: nn.ModuleList = nn.ModuleList(
            CouplingLayer(spec, generator) for _ in range(spec.coupling_layers)
        )

    @property
    def precision(self) -> MatmulPrecision:
        """Deprecated name of matmul_precision."""
        return renamed_precision("auto", self.matmul_precision)

    @precision.setter
    def precision(self, value: MatmulPrecision) -> None:
        self.matmul_precision = renamed_precision("auto", value)

    def weights(self) -> list[CouplingWeights]:
        """Return the tensors of every coupling layer."""
        return [cast(CouplingLayer, layer).weights() for layer in self.module_list]

    def forward(
        self,
        x: Tensor,  # [N, C]
        condition: PositionalRows | Tensor | None = None,  # or [N, P]
        *,
        rows: Tensor | None = None,  # [N] into x
        return_z: bool = False,
        impl: Impl | None = None,
    ) -> FlowOutput:
        """Return the log-likelihood per dimension, the log-determinant and, with `return_z`, the latent of N rows."""
        kind, layers, pack = impl or self.impl, self.weights(), None
        if self._prepared is not None:
            pack = self._prepared.get(self.spec, layers, x, condition, kind, self.matmul_precision)
        return flow_forward(
            x,
            layers,
            self.spec,
            condition,
            rows=rows,
            return_z=return_z,
            impl=kind,
            matmul_precision=self.matmul_precision,
            pack=pack,
        )

    def freeze(self) -> ConditionalFlow:
        """Prepare the weights for inference once, instead of at every call. Return self.

        Weights that change later are prepared again where PyTorch counts the change (optimizers, `load_state_dict`,
        in-place operations); after changes that it does not see (`parameter.data`, a CUDA graph) call `freeze` again. A
        CUDA graph that a user captures of this flow uses the weights that were prepared when it was captured. Gradients
        and the reference are not affected.
        """
        if self._prepared is None:
            self._prepared = PreparedWeights()
        self._prepared.clear()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConditionalFlow:
        """Drop the prepared weights, since they belong to the tensors that are replaced here."""
        if self._prepared is not None:
            self._prepared.clear()
        return super()._apply(fn, recurse)

    def inverse(self, z: Tensor, condition: PositionalRows | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x [N, C] and the log-determinant of the inverse's Jacobian [N]."""
        return flow_inverse(z, self.weights(), self.spec, condition)

    def log_likelihood_map(self, features: Tensor, *, impl: Impl | None = None) -> Tensor:
        """Return lp [B, h, w] of every patch of a level, from features [B, C, h, w]."""
        batch, channels, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).reshape(-1, channels)
        condition = (
            PositionalRows(height, width, channels=self.spec.condition_channels)
            if self.spec.condition_channels
            else None
        )
        return self(rows, condition, impl=impl).log_likelihood.reshape(batch, height, width)

    def extra_repr(self) -> str:
        return repr(self.spec)


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """Return a linear layer drawn from U(-1/sqrt(inputs), 1/sqrt(inputs)), torch's usual distribution, or of zeros."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            if generator is None:
                tensor.zero_()
            else:
                tensor.uniform_(-bound, bound, generator=generator)
    return layer


def _random_rotation(channels: int, generator: torch.Generator) -> Tensor:
    """Return a rotation drawn uniformly from SO(C), float64 [C, C]: QR of a Gaussian matrix (Mezzadri, 2007)."""
    q, r = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64, generator=generator))
    q = q * torch.sign(torch.diagonal(r))
    if torch.linalg.det(q) < 0:
        q[0] = -q[0]
    return q


def _random_permutation(channels: int, generator: torch.Generator) -> Tensor:
    """Return a random permutation matrix, float64 [C, C]."""
    return torch.eye(channels, dtype=torch.float64)[torch.randperm(channels, generator=generator)]
