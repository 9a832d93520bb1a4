"""The flow on a CPU by compiled C++, where `native/flow.cpp` carries tiles of rows through the layers in the cache.

The arithmetic is that of `portable_training` in float32, to rounding. The rows are split into one part per thread,
and the parts' sums of gradients are added in order: the same number of threads gives the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ...errors import FeatureError
from ...flow_spec import CouplingWeights, FlowSpec, GlobalAffine
from ..native.build import library, why_not_native
from ..positional import PositionalRows, axis_code
from ..reused_memory import Block
from .backend import FlowCall, FlowResult, unflatten
from .folded import map_size

# Measured: with 512 it is a tenth quicker than PyTorch's operations, with 32 to 40 half as quick again.
MOST_CHANNELS = 384


class CompiledWeights(NamedTuple):
    """Prepared weights of the compiled backend, for one size of maps."""

    block: Block
    map_size: tuple[int, int] | None

    def serves(self, positions: PositionalRows | None, dtype: torch.dtype) -> bool:
        """Return whether they fit a condition and a type."""
        return dtype == torch.float32 and self.map_size == map_size(positions)


def why_not(
    spec: FlowSpec, layers: Sequence[CouplingWeights], x: Tensor, condition: PositionalRows | Tensor | None
) -> str | None:
    """Return why the compiled code cannot serve a call, or None. Compiles it on first use."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "compiled code cannot be traced"
    if x.device.type != "cpu":
        return f"the compiled code runs on CPU tensors, these are on {x.device.type}"
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in (x, layers[0].w1)):
        return "the compiled code takes plain tensors, no subclass of them"
    if x.dtype == torch.float64:
        return "the compiled code computes in float32, these tensors are float64"
    if isinstance(condition, Tensor):
        return "the compiled code takes a positional condition or none, this one is dense"
    if spec.channels > MOST_CHANNELS:
        return f"the compiled code is made for up to {MOST_CHANNELS} channels, this flow has {spec.channels}"
    return why_not_native()


@torch.no_grad()
def lay_out(layers: Sequence[CouplingWeights], spec: FlowSpec, positions: PositionalRows | None) -> CompiledWeights:
    """Fold the constants of every layer and lay out its weights; later changes of these do not reach the result."""
    code = Code(spec, positions)
    weights = [t.detach().to(torch.float32).contiguous() for layer in layers for t in layer]
    block, addresses = Block(len(layers) * code.sizes.packed, weights[0]), _addresses(weights)
    code.job.packed, code.job.weights = _address(block.tensor), ctypes.addressof(addresses)
    code.run("flow_fold", code.job.layers)
    return CompiledWeights(block, map_size(positions))


def prepare(call: FlowCall) -> CompiledWeights:
    """Return the weights of a call as the compiled code reads them."""
    return lay_out(call.layers, call.spec, call.positions)


@torch.no_grad()
def infer(call: FlowCall, prepared: object = None) -> FlowResult:
    """Return lp [N], log_det [N] and z [N, C] if asked."""
    call = _gathered_unless_read(call)
    positions = call.positions
    if not (isinstance(prepared, CompiledWeights) and prepared.serves(positions, call.dtype)):
        prepared = prepare(call)
    x = call.x.to(call.dtype)
    return CompiledCall(x, call.rows, prepared, call.spec, positions, save=False).forward(x, call.options.return_z)


def train(call: FlowCall) -> FlowResult:
    """Return the same with gradients of x and of every weight."""
    call = _gathered_unless_read(call)
    x, return_z = call.x.to(call.dtype), call.options.return_z
    return FlowFunction.apply(x, call.rows, call.positions, call.spec, return_z, *call.weights)


def _gathered_unless_read(call: FlowCall) -> FlowCall:
    """Return the call with its rows gathered, except where the compiled code reads them from x itself."""
    return call.gathered() if call.x.dtype != torch.float32 or call.x.requires_grad else call


class FlowFunction(torch.autograd.Function):
    """The flow with gradients of x (which needs `rows` of None) and of every weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor | None,
        positions: PositionalRows | None,
        spec: FlowSpec,
        return_z: bool,
        *weights: Tensor,  # the tensors of every layer, in the order of CouplingWeights
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        prepared = lay_out(unflatten(weights), spec, positions)
        ctx.call = CompiledCall(x, rows, prepared, spec, positions, save=True)
        ctx.save_for_backward(*weights)  # which notices where one of them is changed before the backward
        ctx.set_materialize_grads(False)
        return ctx.call.forward(x, return_z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        d_x, gradients = ctx.call.backward(ctx.saved_tensors, upstream, ctx.needs_input_grad[0])
        return d_x, None, None, None, None, *gradients


class Job(ctypes.Structure):
    """As in native/layout.h, which explains its fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("channels", "passive", "hidden", "layers", "condition")),
        *((name, ctypes.c_int64) for name in ("width", "height", "hard", "affine", "rows", "kept")),
        *((name, ctypes.c_int64) for name in ("parts", "next", "failed")),
        *((name, ctypes.c_double) for name in ("clamp", "log_scale")),
        *((name, ctypes.c_void_p) for name in ("weights", "gradients", "column_code", "line_code", "packed")),
        *((name, ctypes.c_void_p) for name in ("x", "selected", "index", "kept_states", "memory")),
        *((name, ctypes.c_void_p) for name in ("lp", "log_det", "z", "d_lp", "d_log_det", "d_z", "sums", "d_x")),
    )


class Sizes(NamedTuple):
    """Numbers of float32, and the rows of a tile."""

    packed: int  # per layer
    sums: int  # of gradients, per layer and part
    states: int  # per tile if they are kept, else per part
    memory: int  # per part
    tile_rows: int


class Code:
    """The compiled code for one flow and size of maps, with its arguments."""

    def __init__(self, spec: FlowSpec, positions: PositionalRows | None, rows: int = 0, save: bool = False) -> None:
        self.job = job = Job(
            channels=spec.channels,
            passive=spec.passive_channels,
            hidden=spec.hidden_channels,
            layers=spec.coupling_layers,
            condition=spec.condition_channels,
            hard=spec.hard_permutation,
            affine=get_args(GlobalAffine).index(spec.global_affine),
            rows=rows,
            kept=save,
            clamp=spec.clamp,
            # FrEIA's 0.1, and tanh(a) = 2 sigmoid(2 a) - 1
            log_scale=0.2 if spec.clamp_form == "tanh" else 0.2 / spec.clamp,
        )
        if positions is not None:
            job.width, job.height = positions.width, positions.height
            self.codes = [padded_code(length, positions.channels // 2) for length in (job.width, job.height)]
            job.column_code, job.line_code = map(_address, self.codes)
        found = (ctypes.c_int64 * len(Sizes._fields))()
        self.library = library()
        self.library.flow_sizes(ctypes.byref(job), found)
        self.sizes = Sizes(*found)
        self.tiles = -(-rows // self.sizes.tile_rows)
        job.parts = max(1, min(torch.get_num_threads(), self.tiles))

    def run(self, name: str, parts: int, job: Job | None = None) -> None:
        """Run the parts of a task in PyTorch's number of threads."""
        task, job = getattr(self.library, name), job or self.job
        job.next = 0
        threads = min(torch.get_num_threads(), parts)
        parallel = openmp_parallel() if threads > 1 else None
        if threads <= 1:
            task(ctypes.byref(job))
        elif parallel is not None:
            parallel(ctypes.cast(task, ctypes.c_void_p), ctypes.byref(job), threads, 0)
        else:
            others = [_pool(threads - 1).submit(task, ctypes.byref(job)) for _ in range(threads - 1)]
            task(ctypes.byref(job))
            for other in others:
                other.result()


class CompiledCall:
    """The rows of one call, and the saved activations that its backward needs."""

    def __init__(
        self,
        x: Tensor,
        rows: Tensor | None,
        prepared: CompiledWeights,
        spec: FlowSpec,
        positions: PositionalRows | None,
        save: bool,
    ) -> None:
        # Copies: the backward reads them again, and they are checked only once for positions outside of the map.
        self.rows = None if rows is None else rows.to(torch.int64, copy=True).contiguous()
        self.index = None if positions is None or positions.index is None else positions.index.clone()
        self.prepared = prepared
        self.code = code = Code(spec, positions, len(x) if rows is None else len(rows), save)
        self.states = Block((code.tiles if save else code.job.parts) * code.sizes.states, prepared.block.tensor)
        code.job.packed, code.job.kept_states = _address(prepared.block.tensor), _address(self.states.tensor)
        code.job.selected, code.job.index = map(_address, (self.rows, self.index))

    def forward(self, x: Tensor, return_z: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        job, new, x = self.code.job, x.new_empty, x.contiguous()
        lp, log_det, z = new(job.rows), new(job.rows), new(job.rows, job.channels) if return_z else None
        memory = Block(job.parts * self.code.sizes.memory, x)
        job.x, job.memory = _address(x), _address(memory.tensor)
        job.lp, job.log_det, job.z = map(_address, (lp, log_det, z))
        self.code.run("flow_forward", job.parts)
        if job.failed:
            raise FeatureError(f"a position lies outside of the {job.height} x {job.width} map of the condition")
        return lp, log_det, z

    def backward(
        self, weights: Sequence[Tensor], upstream: Sequence[Tensor | None], needs_x: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of x [N, C] and of every tensor of every layer; W_perm is fixed and gets None."""
        job = Job.from_buffer_copy(self.code.job)  # a graph may be used by several threads
        like = self.prepared.block.tensor
        d_x = like.new_empty(job.rows, job.channels) if needs_x else None
        operands = [None if d is None else d.contiguous() for d in upstream]
        sums = Block(job.parts * job.layers * self.code.sizes.sums, like)
        memory = Block(job.parts * self.code.sizes.memory, like)
        gradients = [like.new_empty(t.shape) for t in weights]
        addresses = _addresses(gradients)
        job.gradients = ctypes.addressof(addresses)
        job.memory, job.sums, job.d_x = map(_address, (memory.tensor, sums.tensor, d_x))
        job.d_lp, job.d_log_det, job.d_z = map(_address, operands)
        self.code.run("flow_backward", job.parts, job)
        self.code.run("flow_unfold", job.layers, job)
        fields = CouplingWeights._fields
        return d_x, [
            None if fields[i % len(fields)] == "w_perm" else gradient.to(weight.dtype)
            for i, (gradient, weight) in enumerate(zip(gradients, weights, strict=True))
        ]


@functools.lru_cache(maxsize=64)
def padded_code(length: int, channels: int) -> Tensor:
    """Return the positional code of an axis with rows of a multiple of 8 numbers."""
    with torch.inference_mode(False):
        code = axis_code(length, channels, torch.float32, torch.device("cpu"))
        return torch.nn.functional.pad(code, (0, -channels % 8))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(Tensor.data_ptr, tensors))


@functools.cache
def openmp_parallel() -> Any:
    """Return the entry of the OpenMP runtime that PyTorch has loaded, None if it has loaded none.

    Its threads are those of PyTorch's own operations, which keep spinning for some milliseconds after each of them:
    other threads would have to share the cores with them.
    """
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None


_pools: list[ThreadPoolExecutor] = []


def _pool(threads: int) -> ThreadPoolExecutor:
    if not _pools or _pools[0]._max_workers < threads:
        _pools[:] = [ThreadPoolExecutor(threads, thread_name_prefix="fastbgad")]
    return _pools[0]


# Threads do not survive a fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)
