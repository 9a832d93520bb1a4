"""Acceleration of the flows of FrEIA, CFLOW-AD, the official BGAD and anomalib, and its undoing.

    decoder = fastbgad.accelerate(decoder)      # or a model that contains such flows
    z, log_det = decoder(patches, [condition])  # as before

The module object, its parameters, buffers and `state_dict` are unchanged; only its class is replaced by a subclass with
another `forward`. Existing optimizers, schedulers, checkpoints and modules that hold the flow keep working, and
`restore` gives the class back.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ...backbones.frozen_network import FrozenCopy
from ...errors import FeatureError, UnsupportedFlowError
from ...flow_spec import CouplingWeights, FlowSpec
from ...kernels.device_cache import DeviceCache
from ...model.flow import CouplingLayer
from ...ops import FlowOutput, Impl, MatmulPrecision, PositionalRows, flow_forward, flow_inverse
from ...ops.dispatch import check_impl, check_matmul_precision, compute_dtype, renamed_precision
from ...ops.flow.prepared_weights import PreparedWeights
from ...ops.permutations import permutation_matrix
from ...ops.positional_tensor import separable
from ...ops.tensor_state import tensor_state
from ...reference.flow import global_affine_scale
from .anomalib_cflow import AcceleratedCflow, check_cflow, looks_like_cflow
from .blocks import looks_like_flow, read_flow, signature, weights_of
from .class_swap import exporting, original_class, rebuild, swap, swap_back
from .refusals import no_flow, stray_blocks

# Measured: on a CPU, a training call of fewer rows is no quicker here than in FrEIA's own operations, since preparing
# the weights costs the same whatever the number of rows.
FEWEST_TRAINING_ROWS = 200

_Module = TypeVar("_Module", bound=nn.Module)


def accelerate(
    module: _Module,
    *,
    impl: Impl = "auto",
    matmul_precision: MatmulPrecision = "float32",
    precision: MatmulPrecision | None = None,
) -> _Module:
    """Make every flow of AllInOneBlocks in a module compute with fastbgad, in place.

    Args:
        module: FrEIA's `SequenceINN` or `ReversibleSequential`, as CFLOW-AD's and the official BGAD's decoders are;
            anomalib's `CflowModel` or `Cflow`, whose forward then also takes whole maps instead of 64 patches at a
            time; or any module that contains such flows (a DDP wrapper, a Lightning module).
        impl: backend, see `fastbgad.ops`; "auto" chooses by the tensors' device.
        matmul_precision: type of the operands of the kernels' matrix products on a GPU. "float32" stays closest to the
            original; "float16" is faster and keeps log-likelihoods within about 5e-5.
        precision: deprecated name of matmul_precision.

    Returns:
        The same module. An accelerated flow has the same parameter tensors and `state_dict` keys, takes
        `(x, [condition])`, `rev` and `jac`, and returns `(z, log_det)` in x's type with gradients of everything that
        has them. A condition made by `fastbgad.positional_rows` takes the separable path. What differs: forward hooks
        on the inner blocks are not called, and results differ by rounding. On a CPU, training calls of fewer than 200
        rows run the original forward, which is as quick there (impl "auto").

    In inference, prepared weights are kept until the parameters change. Every change that PyTorch counts is noticed.
    `train()` and `eval()` drop the prepared weights too: code that writes to `parameter.data` between two calls must
    call one of them afterwards.

    Raises:
        UnsupportedFlowError: a flow computes something else (GIN, Householder, another subnet, ...), AllInOneBlocks
            are in a GraphINN or in no sequence, or there is no flow; the message names the block and the reason. The
            module is then unchanged. Flows of fastbgad itself are fast already and stay as they are.
    """
    check_impl(impl)
    matmul_precision = renamed_precision(matmul_precision, precision)
    check_matmul_precision(matmul_precision)
    # Everything is read before anything is changed, so that an error leaves the module as it was.
    flows: list[tuple[nn.Module, AcceleratedState]] = []
    models: list[nn.Module] = []
    done = False
    for name, child in module.named_modules():
        if isinstance(child, AcceleratedFlow | AcceleratedCflow | CouplingLayer):
            done = True  # accelerated before, or a layer of a flow of fastbgad, which is fast by itself
        elif looks_like_flow(child):
            label = name or type(child).__name__
            flows.append((child, AcceleratedState(child, label, impl, matmul_precision)))
        elif looks_like_cflow(child):
            check_cflow(child, name or type(child).__name__)
            models.append(child)
    if reason := stray_blocks(module):
        raise UnsupportedFlowError(reason)
    if not flows and not models and not done:
        raise UnsupportedFlowError(no_flow(module))
    for flow, state in flows:
        swap(flow, AcceleratedFlow)
        flow.__dict__["_fastbgad"] = state
        state.make_picklable(flow)
    for model in models:
        swap(model, AcceleratedCflow)
        model.__dict__["_fastbgad"] = FrozenCopy()
    return module


def restore(module: _Module) -> _Module:
    """Undo `accelerate` in place, with the parameters as they are now, and return the same module."""
    for child in module.modules():
        if isinstance(child, AcceleratedFlow | AcceleratedCflow):
            state = child.__dict__.pop("_fastbgad", None)
            if isinstance(state, AcceleratedState):
                state.give_back()
            swap_back(child)
    return module


class AcceleratedState:
    """State of an accelerated flow beside its parameters: its shape, options and prepared weights."""

    spec: FlowSpec
    condition: int | None

    def __init__(self, flow: nn.Module, name: str, impl: Impl, matmul_precision: MatmulPrecision) -> None:
        self.name = name
        self.impl = impl
        self.matmul_precision = matmul_precision
        self.prepared: PreparedWeights = PreparedWeights()
        self._matrices = DeviceCache[Tensor]()
        self._replaced: list[tuple[nn.Module, str, Any]] = []
        self._warned = False
        self.read(flow, flow.forward)

    def read(self, flow: nn.Module, forward: Callable[..., Any]) -> None:
        """Read the shape of the flow off its blocks.

        Args:
            flow: the flow.
            forward: the flow's own forward.

        Raises:
            UnsupportedFlowError: see `accelerate`.
        """
        self.spec, self.condition = read_flow(flow, self.name, forward)
        self.signature: tuple[Any, ...] = signature(flow)

    def weights(self, flow: nn.Module) -> list[CouplingWeights]:
        """Return the tensors of every block, permutations as matrices."""
        return weights_of(flow, self._matrix)

    def run(
        self,
        x: Tensor,
        layers: Sequence[CouplingWeights],
        condition: PositionalRows | Tensor | None,
        return_z: bool,
    ) -> FlowOutput:
        """Compute the flow with prepared weights where they can be used."""
        pack = self.prepared.get(self.spec, layers, x, condition, self.impl, self.matmul_precision)
        return flow_forward(
            x,
            layers,
            self.spec,
            condition,
            return_z=return_z,
            impl=self.impl,
            matmul_precision=self.matmul_precision,
            pack=pack,
        )

    def _matrix(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the matrix of a permutation index, made once per index, device and type."""
        key, state = (id(index), index.device, dtype), tensor_state([index])
        return self._matrices.get(key, index.device, lambda: permutation_matrix(index, dtype), state)

    def make_picklable(self, flow: nn.Module) -> None:
        """Replace the lambdas that FrEIA keeps in its blocks, which cannot be pickled, by functions that can."""
        for block in cast(Any, flow.module_list):
            for name, function in (
                ("global_scale_activation", functools.partial(global_affine_scale, kind=self.spec.global_affine)),
                ("permute_function", _permute_channels),
            ):
                present = block.__dict__.get(name)
                if getattr(present, "__name__", "") == "<lambda>":
                    self._replaced.append((block, name, present))
                    setattr(block, name, function)

    def give_back(self) -> None:
        """Put FrEIA's lambdas back."""
        for block, name, function in self._replaced:
            setattr(block, name, function)

    def forget(self) -> None:
        """Drop the prepared weights and permutation matrices."""
        self.prepared.clear()
        self._matrices.clear()

    def __getstate__(self) -> dict[str, Any]:
        # The lambdas cannot be pickled.
        return {**self.__dict__, "_replaced": []}


class AcceleratedFlow(nn.Module):
    """Mixin before the class of a flow: `forward` computes with fastbgad, everything else is the flow's own."""

    _fastbgad: AcceleratedState

    @property
    def spec(self) -> FlowSpec:
        """Shape of the flow as fastbgad sees it."""
        return self._fastbgad.spec

    def forward(
        self,
        x_or_z: Tensor | tuple[Tensor, ...],  # [N, C]
        c: Any = None,  # list of conditions, each [N, P]
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[Any, Tensor]:
        """Return z [N, C] and log|det J| [N] as FrEIA does; with `rev` x and the inverse's log-determinant.

        torch.compile does not trace into this call and compiles the code around it. An export (torch.export, ONNX,
        tracing) sees the original forward, whose graph does not depend on the number of rows.
        """
        if exporting():
            return super().forward(x_or_z, c=c, rev=rev, jac=jac)
        return self._forward(x_or_z, c, rev, jac)

    @torch.compiler.disable
    def _forward(self, x_or_z: Tensor | tuple[Tensor, ...], c: Any, rev: bool, jac: bool) -> tuple[Any, Tensor]:
        state, layers = self._fastbgad, self._layers()
        if torch.is_grad_enabled() and any(layer.w_perm.requires_grad for layer in layers):
            if not state._warned:
                warnings.warn(
                    f"{state.name}: w_perm requires a gradient, which fastbgad does not compute; the original forward "
                    "runs instead. Call w_perm.requires_grad_(False) for speed.",
                    stacklevel=2,
                )
                state._warned = True
            return super().forward(x_or_z, c=c, rev=rev, jac=jac)
        x = x_or_z if isinstance(x_or_z, Tensor) else x_or_z[0]
        if self._too_few_rows(x, layers):
            return super().forward(x_or_z, c=c, rev=rev, jac=jac)
        condition = self._condition(x, c)
        if rev:
            out, log_det = flow_inverse(x, layers, state.spec, condition)
        else:
            output = state.run(x, layers, condition, return_z=True)
            assert output.z is not None
            out, log_det = output.z, output.log_det
        # Half-precision flows return their own type; where x alone is narrow (autocast) nothing is rounded away.
        dtype = x.dtype if x.dtype == layers[0].w1.dtype else compute_dtype(x)
        out, log_det = out.to(dtype), log_det.to(dtype)
        return (out,) if getattr(self, "force_tuple_output", False) else out, log_det

    def _too_few_rows(self, x: Tensor, layers: Sequence[CouplingWeights]) -> bool:
        """Return True where the original forward is the quicker one."""
        return (
            self._fastbgad.impl == "auto"
            and x.device.type == "cpu"
            and len(x) < FEWEST_TRAINING_ROWS
            and torch.is_grad_enabled()
            and any(tensor.requires_grad for layer in layers for tensor in layer)
        )

    @torch.compiler.disable
    def log_likelihood(self, x: Tensor, condition: PositionalRows | Tensor | None = None) -> Tensor:
        """Return the log-likelihood per dimension [N] of x [N, C], for callers that need no latent."""
        return self._fastbgad.run(x, self._layers(), condition, return_z=False).log_likelihood

    def _layers(self) -> list[CouplingWeights]:
        state = self._fastbgad
        if signature(self) != state.signature:  # blocks were replaced
            state.read(self, super().forward)
            state.forget()
        return state.weights(self)

    def _condition(self, x: Tensor, c: Any) -> PositionalRows | Tensor | None:
        at = self._fastbgad.condition
        if at is None:
            return None
        if c is None or len(c) <= at:
            raise FeatureError(f"{self._fastbgad.name} needs a condition: call it as flow(x, [condition])")
        condition = c[at]
        if len(condition) != len(x):
            raise FeatureError(f"{len(x)} feature rows but a condition of {len(condition)}")
        return separable(condition)

    def train(self, mode: bool = True) -> AcceleratedFlow:
        """Set the mode as `nn.Module.train` does, and drop the prepared weights."""
        self._fastbgad.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._fastbgad.forget()
        return super()._apply(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduce to the mixin and the original class, since the class of this object has no importable name."""
        return rebuild, (AcceleratedFlow, original_class(self)), self.__dict__.copy()


def _permute_channels(x: Tensor, index: Tensor) -> Tensor:
    return x[:, index]
