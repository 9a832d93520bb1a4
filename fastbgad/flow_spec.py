"""Shape (`FlowSpec`) and tensors (`CouplingWeights`) of a conditional normalizing flow.

The reference, the fast paths and the module share these two, so that all can be given the very same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from .errors import ConfigError, check_choice

ClampForm = Literal["tanh", "scaled_tanh"]
GlobalAffine = Literal["SOFTPLUS", "SIGMOID", "EXP"]


@dataclass(frozen=True)
class FlowSpec:
    """Shape of a flow: everything about it that is not a tensor.

    Attributes:
        channels: C, the number of channels of a patch feature, at least 2.
        condition_channels: P, the number of channels of the condition; 0 for an unconditional flow.
        coupling_layers: number of coupling layers.
        clamp: bound of the log-scale s.
        clamp_form: "tanh": s = clamp * tanh(a) (FrEIA 0.2, anomalib, CFLOW-AD, the official BGAD);
            "scaled_tanh": s = clamp * tanh(a / clamp) (FrEIA's main branch since August 2023).
        global_affine: activation of the global scale, named as in FrEIA.
        hard_permutation: W_perm is a permutation matrix instead of a general rotation.
    """

    channels: int
    condition_channels: int = 128
    coupling_layers: int = 8
    clamp: float = 1.9
    clamp_form: ClampForm = "tanh"
    global_affine: GlobalAffine = "SOFTPLUS"
    hard_permutation: bool = False

    def __post_init__(self) -> None:
        if self.channels < 2:
            raise ConfigError(f"a coupling layer needs at least 2 channels to split, not {self.channels}")
        if self.condition_channels < 0 or self.condition_channels % 4:
            raise ConfigError(f"condition_channels is {self.condition_channels}; it must be 0 or a multiple of 4")
        if self.coupling_layers < 1:
            raise ConfigError(f"coupling_layers is {self.coupling_layers}; a flow needs at least one")
        if not self.clamp > 0:
            raise ConfigError(f"clamp is {self.clamp}; it must be positive")
        check_choice("clamp_form", self.clamp_form, ClampForm)
        check_choice("global_affine", self.global_affine, GlobalAffine)

    @property
    def passive_channels(self) -> int:
        """C1 = C - C // 2, the half that passes through a coupling layer unchanged and feeds its subnet."""
        return self.channels - self.channels // 2

    @property
    def active_channels(self) -> int:
        """C2 = C // 2, the half that a coupling layer scales and shifts."""
        return self.channels // 2

    @property
    def hidden_channels(self) -> int:
        """H = 2 (C1 + P), the width of the subnet's hidden layer in BGAD and CFLOW-AD."""
        return 2 * (self.passive_channels + self.condition_channels)


class CouplingWeights(NamedTuple):
    """Tensors of one coupling layer, in FrEIA's orientation."""

    w1: Tensor  # [H, C1 + P], first linear layer of the subnet; its last P columns see the condition
    b1: Tensor  # [H]
    w2: Tensor  # [2 * C2, H], second linear layer
    b2: Tensor  # [2 * C2]
    global_scale: Tensor  # [C], before its activation
    global_offset: Tensor  # [C]
    w_perm: Tensor  # [C, C], orthogonal; out = W_perm v
