"""The official BGAD code's flows: `ConditionalFlow` with the decoder's calling convention and FrEIA's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, FeatureError, check_choice
from ...flow_spec import FlowSpec
from ...model.flow import ConditionalFlow
from ...ops import Impl, MatmulPrecision, PositionalRows, log_likelihood
from ...ops.dispatch import renamed_precision
from ...ops.positional_tensor import PositionalEncoding, positional_map, separable


class FlowDecoder(nn.Module):
    """A flow with the calling convention of FrEIA's `SequenceINN`: `decoder(x, [condition])` returns z and log|det J|.

    Its `state_dict` has the names and shapes of a `SequenceINN` of `AllInOneBlock`s, so files of either load into the
    other. Initial weights are distributed as FrEIA's: a rotation uniform in SO(C), linear layers as PyTorch initializes
    them, a global scale of 1. All are drawn from PyTorch's global random state (FrEIA takes its rotation from numpy's).

    Args:
        spec: the shape of the flow.
        impl, matmul_precision: see `ConditionalFlow`. On a GPU matrix products have float16 operands unless
            matmul_precision is "float32": log-likelihoods then lie within about 5e-5 of float64.
        precision: deprecated name of matmul_precision.
    """

    def __init__(
        self,
        spec: FlowSpec,
        *,
        impl: Impl = "auto",
        matmul_precision: MatmulPrecision = "auto",
        precision: MatmulPrecision | None = None,
    ) -> None:
        super().__init__()
        matmul_precision = renamed_precision(matmul_precision, precision)
        seed = int(torch.randint(2**62, (), device="cpu"))
        flow = ConditionalFlow(spec, seed=seed, impl=impl, matmul_precision=matmul_precision)
        self.module_list: nn.ModuleList = flow.module_list
        # Not registered as a submodule: its parameters are those of module_list, under FrEIA's names.
        object.__setattr__(self, "_flow", flow)

    @property
    def flow(self) -> ConditionalFlow:
        """The flow with the same weights, not a copy, and this package's calling convention."""
        flow: ConditionalFlow = self.__dict__["_flow"]
        return flow

    def forward(
        self, x_or_z: Tensor, c: Sequence[Tensor | PositionalRows] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Apply the flow or its inverse to N rows.

        Args:
            x_or_z: [N, C], floating point. float64 is computed in float64, everything else in float32.
            c: a list whose first entry is the condition: a tensor [N, P], or `fastbgad.PositionalRows`. A tensor that
                keeps track of its positions (`positionalencoding2d`, `fastbgad.positional_rows`) costs no product with
                its P channels. An unconditional flow ignores it, as in FrEIA.
            rev: apply the inverse, from latents to features.
            jac: ignored; FrEIA's blocks compute the determinant in any case.

        Returns:
            z [N, C] and log|det J| [N]; with rev x and the log-determinant of the inverse.

        Raises:
            FeatureError: shapes or devices that do not fit, or a missing condition.
            BackendError, ConfigError: see `fastbgad.ops.dispatch`.
        """
        condition = self._condition(c) if self.flow.spec.condition_channels else None
        if rev:
            return self.flow.inverse(x_or_z, condition)
        output = self.flow(x_or_z, condition, return_z=True)
        assert output.z is not None
        return output.z, output.log_det

    def freeze(self) -> FlowDecoder:
        """Prepare the weights for inference once instead of at every call, see `ConditionalFlow.freeze`."""
        self.flow.freeze()
        return self

    def _condition(self, c: Sequence[Tensor | PositionalRows] | None) -> Tensor | PositionalRows:
        if c is None or isinstance(c, Tensor) or len(c) == 0:
            raise FeatureError(
                "this flow has a condition; call it with a list that holds the condition: decoder(x, [c])"
            )
        condition = c[0]
        if isinstance(condition, PositionalRows):
            return condition
        return separable(condition)

    def extra_repr(self) -> str:
        """Return the shape of the flow, for the printed module."""
        return repr(self.flow.spec)


def conditional_flow_model(args: Any, in_channels: int) -> FlowDecoder:
    """Return a flow over [N, in_channels] with a condition of `args.pos_embed_dim` channels, a multiple of 4.

    It has `args.coupling_layers` layers whose log-scale is bounded by `args.clamp_alpha`.

    Raises:
        ConfigError: args lacks an option, or has an impossible size.
    """
    channels = option(args, "pos_embed_dim")
    if channels < 1:
        raise ConfigError(f"args.pos_embed_dim is {channels}; a conditional flow needs a multiple of 4")
    return FlowDecoder(FlowSpec(in_channels, channels, option(args, "coupling_layers"), option(args, "clamp_alpha")))


def flow_model(args: Any, in_channels: int) -> FlowDecoder:
    """Return a flow without a condition: `decoder(x)`; see `conditional_flow_model`."""
    return FlowDecoder(FlowSpec(in_channels, 0, option(args, "coupling_layers"), option(args, "clamp_alpha")))


def load_flow_model(args: Any, in_channels: int) -> FlowDecoder:
    """Return the flow that `args.flow_arch` names: "conditional_flow_model" or "flow_model".

    Raises:
        ConfigError: another name (a NotImplementedError in the official code); else as `conditional_flow_model`.
    """
    architecture = option(args, "flow_arch")
    models = {"flow_model": flow_model, "conditional_flow_model": conditional_flow_model}
    check_choice("args.flow_arch", architecture, models)
    return models[architecture](args, in_channels)


def get_logp(C: int, z: Tensor, logdet_J: Tensor) -> Tensor:
    """Return the log-likelihood [N] of each row in nats, not divided by C: -C/2 ln(2 pi) - |z|^2 / 2 + logdet_J.

    Args:
        C: number of channels.
        z: [N, C], the latent, floating point.
        logdet_J: [N], log|det J|.

    Returns:
        float64 if an argument is, float32 otherwise; differentiable.

    Raises:
        FeatureError: shapes, types or devices that do not fit.
    """
    if z.dim() == 2 and z.shape[1] != C:
        raise FeatureError(f"C is {C} but z has {z.shape[1]} channels; C is the number of channels of z")
    return C * log_likelihood(z, logdet_J)


def positionalencoding2d(D: int, H: int, W: int) -> PositionalEncoding:
    """Return the positional condition of every position of a map, float32 [D, H, W] on the CPU.

    It is computed in float64; the error of the official float32 values grows by 6e-8 per position from the corner. The
    tensor keeps track of its positions through repeat, permute, reshape and selections, which lets flows of fastbgad
    use its structure: see `fastbgad.ops.positional_tensor`.

    Raises:
        FeatureError: D is not a positive multiple of 4 (a ValueError in the official code), or an empty map.
    """
    return positional_map(D, H, W)


def option(args: Any, name: str) -> Any:
    """Return `args.name`, or raise a `ConfigError` that names it."""
    if not hasattr(args, name):
        raise ConfigError(f"args has no attribute {name}; give the options of the official code's config.py")
    return getattr(args, name)
