"""One call of the flow, and the three verbs of a backend that may serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...flow_spec import CouplingWeights, FlowSpec
from ..dispatch import OperandPrecision
from ..positional import PositionalRows

# lp [N], log_det [N], and z [N, C] if it was asked for
FlowResult = tuple[Tensor, Tensor, Tensor | None]


class FlowOptions(NamedTuple):
    """Options of `fastbgad.ops.flow_forward` that concern its arithmetic."""

    return_z: bool = False
    matmul_precision: OperandPrecision = "float16"
    chunk_rows: int | None = None
    recompute: bool | None = None


@dataclass(frozen=True)
class FlowCall:
    """Arguments of one call of the flow, after they were checked.

    No NamedTuple: Dynamo of PyTorch 2.8 does not trace the properties of one.
    """

    x: Tensor  # [N, C], or [R, C] with rows
    layers: Sequence[CouplingWeights]
    spec: FlowSpec
    condition: PositionalRows | Tensor | None
    rows: Tensor | None  # [N] into x and the condition
    dtype: torch.dtype  # of the arithmetic
    needs_grad: bool
    options: FlowOptions

    @property
    def positions(self) -> PositionalRows | None:
        """The condition, if it is positional."""
        return self.condition if isinstance(self.condition, PositionalRows) else None

    @property
    def dense(self) -> Tensor | None:
        """The condition, if it is a tensor [N, P]; in its own type."""
        return self.condition if isinstance(self.condition, Tensor) else None

    @property
    def weights(self) -> list[Tensor]:
        """The tensors of all layers, seven per layer, in the order of `CouplingWeights`."""
        return [tensor for layer in self.layers for tensor in layer]

    def gathered(self) -> FlowCall:
        """Return the call with the selected rows in place of all and their indices."""
        if self.rows is None:
            return self
        x, condition = self.x.index_select(0, self.rows), self.condition
        if isinstance(condition, PositionalRows):
            position = self.rows.long() % (condition.height * condition.width)
            condition = PositionalRows(condition.height, condition.width, position, condition.channels)
        elif condition is not None:
            condition = condition[self.rows.long()]
        return FlowCall(x, self.layers, self.spec, condition, None, self.dtype, self.needs_grad, self.options)


class FlowBackend(NamedTuple):
    """One implementation of the flow.

    Attributes:
        name: tells backends apart.
        prepare: returns the weights as inference reads them; None for a backend that prepares none that could be kept.
        infer: computes a call without gradients, from weights that were prepared before or, without them, from the
            call's own. Prepared weights of another backend are ignored.
        train: computes a call with gradients.

    All run with autocast switched off.
    """

    name: str
    prepare: Callable[[FlowCall], Any] | None
    infer: Callable[[FlowCall, Any], FlowResult]
    train: Callable[[FlowCall], FlowResult]


def unflatten(weights: Sequence[Tensor]) -> list[CouplingWeights]:
    """Return the tensors of all layers, seven per layer in one sequence, as layers."""
    size = len(CouplingWeights._fields)
    return [CouplingWeights(*weights[i : i + size]) for i in range(0, len(weights), size)]
