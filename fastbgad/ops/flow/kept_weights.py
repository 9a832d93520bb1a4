"""The form of a flow's weights that inference computes with, made once and kept until the weights change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ...flow_spec import CouplingWeights, FlowSpec
from ...kernels.device_cache import DeviceCache
from .. import FlowPack, Geometry, Impl, MatmulPrecision, PositionalRows, pack_flow
from ..dispatch import compute_dtype, resolve_impl
from ..tensor_state import tensor_state
from . import onednn as flow_packed
from .compiled import NativeFlow, pack_native
from .dispatcher import FlowImpl, is_wide, portable_or_native
from .folded import FoldedFlow, fold_flow
from .onednn import PackedFlow

Prepared = FlowPack | FoldedFlow | PackedFlow | NativeFlow

# Of one flow. Each is as large as its weights; maps of two sizes in turn should not fold anew at every call.
MOST_KEPT = 4


class KeptWeights:
    """Folded or packed weights of one flow, per implementation, size of the maps, type and device.

    Weights that change are noticed where PyTorch counts changes (optimisers, `load_state_dict`, in-place operations);
    what writes behind its back (`parameter.data`, a CUDA graph) needs a `clear`.

    A call that is captured as a CUDA graph uses what is kept, and every replay goes on with these very weights: they
    are never freed while this object lives (`DeviceCache`). Where nothing fits, the captured call prepares its weights
    itself at every replay.
    """

    def __init__(self) -> None:
        self._kept = DeviceCache[Prepared](MOST_KEPT)

    def clear(self) -> None:
        """Forget the weights, except for the graphs that read them."""
        self._kept.clear()

    def values(self) -> list[Prepared]:
        """The forms that are kept now, the oldest first."""
        return cast(list[Prepared], self._kept.values())

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
        matmul_precision: MatmulPrecision,
    ) -> Prepared | None:
        """The kept form for `ops.flow_forward`; None for calls that cannot use it: gradients, the oracle, tracing."""
        if torch.compiler.is_compiling():
            return None
        tensors = [tensor for layer in layers for tensor in layer]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return None
        kind: FlowImpl = resolve_impl(impl, x)
        if kind == "torch":
            kind = portable_or_native(impl, x, layers, spec, condition)
        if kind == "reference" or (kind == "triton" and is_wide(spec, matmul_precision, needs_grad=False)):
            return None
        geometry, dtype = Geometry.of(condition, matmul_precision), compute_dtype(x)

        def prepare() -> Prepared:
            if kind == "triton":
                return pack_flow(layers, spec, geometry)
            positions = condition if isinstance(condition, PositionalRows) else None
            if kind == "native":
                return pack_native(layers, spec, positions)
            if flow_packed.available(spec, dtype, x.device):
                return flow_packed.pack_products(layers, spec, positions, len(x))
            return fold_flow(layers, spec, positions, dtype)

        key = kind, geometry, dtype, x.device
        return cast(Prepared, self._kept.get(key, x.device, prepare, tensor_state(tensors)))
