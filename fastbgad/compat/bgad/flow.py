"""The official BGAD code's flows: the decoder's calling convention and FrEIA's names, around `ConditionalFlow`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, FeatureError
from ...flow_spec import FlowSpec
from ...model.flow import ConditionalFlow
from ...ops import Impl, MatmulPrecision, PositionalRows
from ...ops.dispatch import renamed_precision
from ...ops.positional_tensor import separable


class FlowDecoder(nn.Module):
    """A flow that is called as FrEIA's `SequenceINN` is: `decoder(x, [condition])` returns z and log|det J|.

    Its `state_dict` has the names and shapes of a `SequenceINN` of `AllInOneBlock`s, so files of either load into the
    other. Initial weights are distributed as FrEIA's: a rotation uniform in SO(C), linear layers as PyTorch makes them,
    a global scale of 1. All are drawn from PyTorch's global random state (FrEIA takes its rotation from numpy's).

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
        self.module_list = flow.module_list
        # No submodule: its parameters are those of module_list, and their names are FrEIA's.
        object.__setattr__(self, "_flow", flow)

    @property
    def flow(self) -> ConditionalFlow:
        """The same weights, not a copy, with this package's calling convention."""
        flow: ConditionalFlow = self.__dict__["_flow"]
        return flow

    def forward(
        self, x_or_z: Tensor, c: Sequence[Tensor | PositionalRows] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Carries N rows through the flow, or back.

        Args:
            x_or_z: [N, C], floating point. float64 is computed in float64, everything else in float32.
            c: a list whose first entry is the condition: a tensor [N, P], or `fastbgad.PositionalRows`. A tensor that
                knows its places (`positionalencoding2d`, `fastbgad.positional_rows`) costs no product with its P
                channels. An unconditional flow takes no notice of it, as in FrEIA.
            rev: from the latent back to features.
            jac: has no effect; FrEIA's blocks compute the determinant in any case.

        Returns:
            z [N, C] and log|det J| [N]; with rev x and the log-determinant of the inverse.

        Raises:
            FeatureError: shapes or devices that do not fit, or a missing condition.
            BackendError, ConfigError: see `fastbgad.ops.dispatch`.
        """
        condition = self._condition(c) if self.flow.spec.condition_channels else None
        if rev:
            return self.flow.inverse(x_or_z, condition)
        found = self.flow(x_or_z, condition, return_z=True)
        assert found.z is not None
        return found.z, found.log_det

    def freeze(self) -> FlowDecoder:
        """For inference: prepares the weights once instead of at every call, see `ConditionalFlow.freeze`."""
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
        return repr(self.flow.spec)


def conditional_flow_model(args: Any, in_channels: int) -> FlowDecoder:
    """A flow over [N, in_channels] under a condition of `args.pos_embed_dim` channels, a multiple of 4.

    It has `args.coupling_layers` layers whose log-scale is bounded by `args.clamp_alpha`.

    Raises:
        ConfigError: args lacks an option, or a size that cannot be.
    """
    channels = option(args, "pos_embed_dim")
    if channels < 1:
        raise ConfigError(f"args.pos_embed_dim is {channels}; a conditional flow needs a multiple of 4")
    return FlowDecoder(FlowSpec(in_channels, channels, option(args, "coupling_layers"), option(args, "clamp_alpha")))


def flow_model(args: Any, in_channels: int) -> FlowDecoder:
    """The same without a condition: `decoder(x)`."""
    return FlowDecoder(FlowSpec(in_channels, 0, option(args, "coupling_layers"), option(args, "clamp_alpha")))


def load_flow_model(args: Any, in_channels: int) -> FlowDecoder:
    """The flow that `args.flow_arch` names: "conditional_flow_model" or "flow_model".

    Raises:
        ConfigError: another name (a NotImplementedError in the official code); else as `conditional_flow_model`.
    """
    architecture = option(args, "flow_arch")
    if architecture == "conditional_flow_model":
        return conditional_flow_model(args, in_channels)
    if architecture == "flow_model":
        return flow_model(args, in_channels)
    raise ConfigError(f"args.flow_arch is {architecture!r}; choose one of flow_model, conditional_flow_model")


def option(args: Any, name: str) -> Any:
    """`args.name`, or a `ConfigError` that names it."""
    if not hasattr(args, name):
        raise ConfigError(f"args has no attribute {name}; give the options of the official code's config.py")
    return getattr(args, name)
