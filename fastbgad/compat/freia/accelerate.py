"""`accelerate` and `restore`: the flows of FrEIA, CFLOW-AD, the official BGAD and anomalib, computed by fastbgad.

    decoder = fastbgad.accelerate(decoder)      # or a model that contains such flows
    z, log_det = decoder(patches, [condition])  # as before

A flow keeps its object, its parameters, its buffers and its `state_dict`; only its class changes, to a subclass of its
own class with another `forward`. So optimisers, checkpoints, schedulers and other modules that hold it go on as they
are, and `restore` gives the class back.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ...backbones.frozen_network import FrozenCopy
from ...errors import FeatureError, UnsupportedFlowError
from ...flow_spec import CouplingWeights, FlowSpec
from ...kernels.device_cache import DeviceCache
from ...model.flow import ConditionalFlow
from ...ops import FlowOutput, Impl, MatmulPrecision, PositionalRows, flow_forward, flow_inverse
from ...ops.dispatch import check_impl, check_matmul_precision, compute_dtype, renamed_precision
from ...ops.flow.prepared_weights import PreparedWeights
from ...ops.permutations import permutation_matrix
from ...ops.positional_tensor import separable
from ...ops.tensor_state import tensor_state
from ...reference.flow import global_affine_scale
from ..bgad.flow import FlowDecoder
from .anomalib_cflow import AcceleratedCflow, check_cflow, looks_like_cflow
from .blocks import looks_like_flow, read_flow, signature, weights_of
from .class_swap import exporting, original_class, rebuild, swap, swap_back

# Measured: on a CPU, a training call of fewer rows is no quicker here than in FrEIA's own operations, since folding the
# weights costs the same whatever the number of rows.
FEWEST_TRAINING_ROWS = 200

_Module = TypeVar("_Module", bound=nn.Module)


def accelerate(
    module: _Module,
    *,
    impl: Impl = "auto",
    matmul_precision: MatmulPrecision = "float32",
    precision: MatmulPrecision | None = None,
) -> _Module:
    """Makes every flow of AllInOneBlocks in a module compute with fastbgad, in place.

    Args:
        module: FrEIA's `SequenceINN` or `ReversibleSequential`, as CFLOW-AD's and the official BGAD's decoders are;
            anomalib's `CflowModel` or `Cflow`, whose forward then also takes whole maps instead of 64 patches at a
            time; or any module that contains such flows (a DDP wrapper, a Lightning module).
        impl: which implementation, see `fastbgad.ops`; "auto" follows the tensors.
        matmul_precision: operands of the kernels' matrix products on a GPU. "float32" stays closest to the original;
            "float16" is faster and keeps log-likelihoods within about 5e-5.
        precision: deprecated name of matmul_precision.

    Returns:
        The same module. An accelerated flow has the same parameter tensors and `state_dict` keys, takes
        `(x, [condition])`, `rev` and `jac`, and returns `(z, log_det)` in x's type with gradients of everything that
        has them. A condition made by `fastbgad.positional_rows` takes the separable path. What differs: forward hooks
        on the inner blocks are not called, and results differ by rounding. On a CPU, training calls of fewer than 200
        rows run the original forward, which is as quick there (impl "auto").

    In inference, folded weights are kept until the parameters change. Every change is noticed that PyTorch counts, and
    `train()` and `eval()` forget what is kept; code that writes to `parameter.data` between two calls without either
    must call `eval()` afterwards.

    Raises:
        UnsupportedFlowError: a flow computes something else (GIN, Householder, another subnet, ...), or there is none;
            names the block and the reason. The module is then exactly as it was. Flows of fastbgad itself are fast
            already and stay as they are.
    """
    check_impl(impl)
    matmul_precision = renamed_precision(matmul_precision, precision)
    check_matmul_precision(matmul_precision)
    # everything is read before anything is changed
    flows, models, done = [], [], False
    for name, child in module.named_modules():
        if isinstance(child, AcceleratedFlow | AcceleratedCflow | FlowDecoder | ConditionalFlow):
            done = True  # accelerated before, or fast by itself
        elif looks_like_flow(child):
            label = name or type(child).__name__
            flows.append((child, AcceleratedState(child, label, impl, matmul_precision)))
        elif looks_like_cflow(child):
            check_cflow(child, name or type(child).__name__)
            models.append(child)
    if not flows and not models and not done:
        raise UnsupportedFlowError(
            f"{type(module).__name__} contains no flow of AllInOneBlocks; give a FrEIA SequenceINN, anomalib's Cflow, "
            "or a module that contains one"
        )
    for flow, state in flows:
        swap(flow, AcceleratedFlow)
        flow.__dict__["_fastbgad"] = state
        state.make_picklable(flow)
    for model in models:
        swap(model, AcceleratedCflow)
        model.__dict__["_fastbgad"] = FrozenCopy()
    return module


def restore(module: _Module) -> _Module:
    """Undoes `accelerate` in place, with the parameters as they are now; returns the same module."""
    for child in module.modules():
        if isinstance(child, AcceleratedFlow | AcceleratedCflow):
            state = child.__dict__.pop("_fastbgad", None)
            if isinstance(state, AcceleratedState):
                state.give_back()
            swap_back(child)
    return module


class AcceleratedState:
    """What an accelerated flow knows beside its parameters."""

    spec: FlowSpec
    condition: int | None

    def __init__(self, flow: nn.Module, name: str, impl: Impl, matmul_precision: MatmulPrecision) -> None:
        self.name, self.impl, self.matmul_precision = name, impl, matmul_precision
        self.prepared = PreparedWeights()
        self._matrices = DeviceCache[Tensor]()
        self._replaced: list[tuple[nn.Module, str, Any]] = []
        self._warned = False
        self.read(flow, flow.forward)

    def read(self, flow: nn.Module, forward: Any) -> None:
        self.spec, self.condition = read_flow(flow, self.name, forward)
        self.signature = signature(flow)

    def weights(self, flow: nn.Module) -> list[CouplingWeights]:
        return weights_of(flow, self._matrix)

    def run(
        self,
        x: Tensor,
        layers: Sequence[CouplingWeights],
        condition: PositionalRows | Tensor | None,
        return_z: bool,
    ) -> FlowOutput:
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
        """The matrix of a permutation index, made once per index, device and type."""
        key, state = (id(index), index.device, dtype), tensor_state([index])
        return cast(Tensor, self._matrices.get(key, index.device, lambda: permutation_matrix(index, dtype), state))

    def make_picklable(self, flow: nn.Module) -> None:
        """FrEIA keeps lambdas in its blocks, which cannot be pickled; functions that can take their place."""
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
        for block, name, function in self._replaced:
            setattr(block, name, function)

    def forget(self) -> None:
        self.prepared.clear()
        self._matrices.clear()

    def __getstate__(self) -> dict[str, Any]:
        # the lambdas stay here
        return {**self.__dict__, "_replaced": []}


class AcceleratedFlow(nn.Module):
    """What goes before the class of a flow: `forward` computes with fastbgad, everything else is the flow's own."""

    _fastbgad: AcceleratedState

    @property
    def spec(self) -> FlowSpec:
        """The shape of the flow as fastbgad sees it."""
        return self._fastbgad.spec

    def forward(
        self,
        x_or_z: Tensor | tuple[Tensor, ...],  # [N, C]
        c: Any = None,  # list of conditions, each [N, P]
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[Any, Tensor]:
        """z [N, C] and log|det J| [N] as FrEIA returns them; with `rev` x and the inverse's log-determinant.

        torch.compile leaves this call as it is and compiles what is around it. An export (torch.export, ONNX, tracing)
        sees the original forward, whose graph does not depend on the number of rows.
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
                    "runs instead. Say requires_grad_(False) of w_perm for speed.",
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
            found = state.run(x, layers, condition, return_z=True)
            assert found.z is not None
            out, log_det = found.z, found.log_det
        # Half-precision flows return their own type; where x alone is narrow (autocast) nothing is rounded away.
        dtype = x.dtype if x.dtype == layers[0].w1.dtype else compute_dtype(x)
        out, log_det = out.to(dtype), log_det.to(dtype)
        return (out,) if getattr(self, "force_tuple_output", False) else out, log_det

    def _too_few_rows(self, x: Tensor, layers: Sequence[CouplingWeights]) -> bool:
        """Whether the original forward is the quicker one."""
        return (
            self._fastbgad.impl == "auto"
            and x.device.type == "cpu"
            and len(x) < FEWEST_TRAINING_ROWS
            and torch.is_grad_enabled()
            and any(tensor.requires_grad for layer in layers for tensor in layer)
        )

    @torch.compiler.disable
    def log_likelihood(self, x: Tensor, condition: PositionalRows | Tensor | None = None) -> Tensor:
        """lp of x [N, C]: log-likelihood per dimension [N], for callers that need no latent."""
        return self._fastbgad.run(x, self._layers(), condition, return_z=False).log_likelihood

    def _layers(self) -> list[CouplingWeights]:
        state = self._fastbgad
        if signature(self) != state.signature:  # blocks were exchanged
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
        self._fastbgad.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._fastbgad.forget()
        return super()._apply(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles: the class is made again where they go."""
        return rebuild, (AcceleratedFlow, original_class(self)), self.__dict__.copy()


def _permute_channels(x: Tensor, index: Tensor) -> Tensor:
    return x[:, index]
