"""Prepared weights of a flow, made once for inference and kept until the weights change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...flow_spec import CouplingWeights, FlowSpec
from ...kernels.device_cache import DeviceCache
from ..dispatch import Impl, MatmulPrecision, compute_dtype, resolve_matmul_precision
from ..positional import PositionalRows
from ..tensor_state import tensor_state
from .backend import FlowCall, FlowOptions
from .choice import PreparedFlow, choose
from .kernel_weights import Geometry

# Entries of one flow, each as large as its weights. Maps of two sizes in turn should not be prepared at every call.
MOST_ENTRIES = 4


class PreparedWeights:
    """Prepared weights of one flow, per backend, size of the maps, type and device.

    Weights that change are noticed where PyTorch counts changes (optimizers, `load_state_dict`, in-place operations);
    code that writes without being counted (`parameter.data`, a CUDA graph) needs a `clear`.

    A call that is captured as a CUDA graph uses an entry, and every replay uses the same one: entries of captured calls
    are never freed while this object lives (`DeviceCache`). Without a fitting entry, the captured call prepares its
    weights itself at every replay.
    """

    def __init__(self) -> None:
        self._entries = DeviceCache[PreparedFlow](MOST_ENTRIES)

    def clear(self) -> None:
        """Drop all entries but those of captured graphs."""
        self._entries.clear()

    def values(self) -> list[PreparedFlow]:
        """Return the entries for later calls, the oldest first."""
        return self._entries.values()

    def __reduce__(self) -> tuple[type[PreparedWeights], tuple[()]]:
        """Make copies and pickles start empty: entries belong to these very tensors."""
        return PreparedWeights, ()

    def get(
        self,
        spec: FlowSpec,
        layers: Sequence[CouplingWeights],
        x: Tensor,
        condition: PositionalRows | Tensor | None,
        impl: Impl,
        matmul_precision: MatmulPrecision,
    ) -> PreparedFlow | None:
        """Return the weights for `ops.flow_forward`, or None for calls that cannot use any.

        These are calls with gradients, of a backend that prepares nothing, and during tracing.
        """
        if torch.compiler.is_compiling():
            return None
        tensors = [tensor for layer in layers for tensor in layer]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return None
        options = FlowOptions(matmul_precision=resolve_matmul_precision(matmul_precision))
        call = FlowCall(x, layers, spec, condition, None, compute_dtype(x), needs_grad=False, options=options)
        backend = choose(impl, call, keeps=True)
        if backend.prepare is None:
            return None
        prepare = backend.prepare
        key = backend.name, Geometry.of(condition, matmul_precision), call.dtype, x.device
        return self._entries.get(key, x.device, lambda: prepare(call), tensor_state(tensors))
