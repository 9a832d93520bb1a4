"""The choice of the backend that serves a call of the flow: the only place that decides it."""

from __future__ import annotations

from ...errors import BackendError
from ...flow_spec import FlowSpec
from ...kernels.flow.weights import MOST_CHANNELS, most_channels_with_gradients
from ..dispatch import Impl, OperandPrecision, resolve_impl
from . import compiled, kernel_weights, onednn, portable, portable_training, reference_backend, registered, wide
from .backend import FlowBackend, FlowCall
from .compiled import CompiledWeights
from .folded import PortableWeights
from .kernel_weights import FlowPack
from .onednn import OnednnWeights

PreparedFlow = FlowPack | PortableWeights | OnednnWeights | CompiledWeights

# A row's whole condition is one operand of the kernels.
MOST_CONDITION_CHANNELS = 128

REFERENCE = FlowBackend("reference", None, reference_backend.infer, reference_backend.train)
PORTABLE = FlowBackend("portable", portable.prepare, portable.infer, portable_training.train)
ONEDNN = FlowBackend("onednn", onednn.prepare, onednn.infer, portable_training.train)
COMPILED = FlowBackend("compiled", compiled.prepare, compiled.infer, compiled.train)
KERNELS = FlowBackend("kernels", kernel_weights.prepare, registered.infer, registered.train)
WIDE = FlowBackend("wide", None, wide.infer, wide.train)


def choose(impl: Impl, call: FlowCall, prepared: PreparedFlow | None = None, *, keeps: bool = False) -> FlowBackend:
    """Return the backend that serves a call.

    Args:
        impl: what the user asked for.
        call: its tensors, shapes and options decide what is left open.
        prepared: weights at hand; oneDNN serves only calls that have its own.
        keeps: weights are about to be prepared and kept for many calls, so oneDNN may lay them out.

    Raises:
        ConfigError: an unknown `impl`.
        BackendError: an explicit `impl` cannot serve this call.
    """
    family = resolve_impl(impl, call.x)
    if family == "reference":
        return REFERENCE
    if family == "triton":
        if is_wide(call.spec, call.options.matmul_precision, call.needs_grad):
            return WIDE
        if not (call.needs_grad and call.dense is not None and call.dense.requires_grad):
            return KERNELS
        if impl == "triton":
            raise BackendError(
                'impl="triton" has no gradient for a dense condition; use impl="torch", or detach the condition'
            )
    if _compiled_serves(impl, call):
        return COMPILED
    return ONEDNN if _onednn_serves(call, prepared, keeps) else PORTABLE


def is_wide(spec: FlowSpec, matmul_precision: OperandPrecision, needs_grad: bool) -> bool:
    """Return whether a flow or its condition has too many channels to keep its rows on the chip through all layers."""
    most = most_channels_with_gradients(matmul_precision) if needs_grad else MOST_CHANNELS
    return spec.channels > most or spec.condition_channels > MOST_CONDITION_CHANNELS


def _compiled_serves(impl: Impl, call: FlowCall) -> bool:
    options = call.options
    if impl == "torch" or (impl != "native" and options.chunk_rows is not None):
        return False
    if call.needs_grad and options.matmul_precision == "bfloat16":
        return False
    obstacle = compiled.why_not(call.spec, call.layers, call.x, call.condition)
    if obstacle is not None and impl == "native":
        raise BackendError(f'impl="native": {obstacle}; use impl="torch" or "auto"')
    return obstacle is None


def _onednn_serves(call: FlowCall, prepared: PreparedFlow | None, keeps: bool) -> bool:
    if keeps:
        return onednn.available(call.spec, call.dtype, call.x.device)
    if call.needs_grad or call.options.chunk_rows is not None:
        return False
    return isinstance(prepared, OnednnWeights) and prepared.serves(call.positions, call.dtype)
