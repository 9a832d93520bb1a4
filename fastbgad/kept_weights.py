"""The form of a flow's weights that inference computes with, made once and kept until the weights change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .flow_spec import CouplingWeights, FlowSpec
from .ops import FlowPack, Geometry, Impl, PositionalRows, Precision, flow_packed, pack_flow
from .ops.dispatch import compute_dtype, resolve_impl
from .ops.flow import FlowImpl, is_wide, portable_or_native
from .ops.flow_native import NativeFlow, pack_native
from .ops.flow_packed import PackedFlow
from .ops.flow_tables import FoldedFlow, fold_flow
from .tensor_state import TensorState, tensor_state

# Of one flow. Each is as large as its weights; maps of two sizes in turn should not fold anew at every call.
MOST_KEPT = 4


class KeptWeights:
    """Folded or packed weights of one flow, per implementation, size of the maps, type and device.

    Weights that change are noticed where PyTorch counts changes (optimisers, `load_state_dict`, in-place operations);
    what writes behind its back (`parameter.data`, a CUDA graph) needs a `clear`.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[TensorState, FlowPack | FoldedFlow | PackedFlow | NativeFlow]] = {}

    def clear(self) -> None:
        self._kept.clear()

    def __reduce__(self) -> tuple[type[KeptWeights], tuple[()]]:
        """Copies and pickles start empty: what is kept belongs to these very tensors."""
        return KeptWeights, ()

    def get(
        self,
        spec: FlowSpec,
        layers: Sequence[CouplingWeights],
        x: Tensor,
        condition: PositionalRows | Tensor | None,
        impl: Impl,
        precision: Precision,
    ) -> FlowPack | FoldedFlow | PackedFlow | NativeFlow | None:
        """The kept form for `ops.flow_forward`; None for calls that cannot use it: gradients, the oracle, tracing."""
        if torch.compiler.is_compiling():
            return None
        tensors = [tensor for layer in layers for tensor in layer]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return None
        kind: FlowImpl = resolve_impl(impl, x)
        if kind == "torch":
            kind = portable_or_native(impl, x, layers, spec, condition)
        if kind == "reference" or (kind == "triton" and is_wide(spec, precision, needs_grad=False)):
            return None
        geometry, dtype = Geometry.of(condition, precision), compute_dtype(x)
        key = kind, geometry, dtype, x.device
        state = tensor_state(tensors)
        kept = self._kept.get(key)
        if kept is None or kept[0] != state:
            if kind == "triton":
                kept = state, pack_flow(layers, spec, geometry)
            else:
                positions = condition if isinstance(condition, PositionalRows) else None
                if kind == "native":
                    kept = state, pack_native(layers, spec, positions)
                elif flow_packed.available(spec, dtype, x.device):
                    kept = state, flow_packed.pack_products(layers, spec, positions, len(x))
                else:
                    kept = state, fold_flow(layers, spec, positions, dtype)
            self._kept.pop(key, None)
            while len(self._kept) >= MOST_KEPT:
                del self._kept[next(iter(self._kept))]  # the oldest
            self._kept[key] = kept
        return kept[1]
