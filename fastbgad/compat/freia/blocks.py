"""Reading of a FrEIA flow's shape and tensors off its blocks, checked against what the flow computes.

The blocks of FrEIA 0.2, of its main branch and anomalib's copy share a name and differ in what they compute: the form
of the clamp, how a hard permutation is stored. Nothing here looks at versions. The clamp and the global affine are
recognized by calling the block's own functions on a few numbers, and the whole reading is confirmed by comparing the
flow with the reference on a few rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from ... import reference
from ...errors import ConfigError, UnsupportedFlowError
from ...flow_spec import ClampForm, CouplingWeights, FlowSpec, GlobalAffine
from ...ops.permutations import is_permutation_matrix, permutation_matrix

PROBE_ROWS = 5
# Largest allowed difference of the flow from the reference on the probe, relative to the reference's root mean square:
# room for rounding in a trained flow; a flow that computes something else is off by about 1.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 0.5}

_BLOCK_ATTRIBUTES = (
    "in_channels",
    "clamp",
    "GIN",
    "householder",
    "reverse_pre_permute",
    "input_rank",
    "global_scale",
    "global_offset",
    "global_scale_activation",
    "_affine",
    "subnet",
)


class FlowReading(NamedTuple):
    """Shape of a flow, and the condition that it takes."""

    spec: FlowSpec
    condition: int | None  # index in the list of conditions, the same for all blocks


def looks_like_flow(module: nn.Module) -> bool:
    """Return True for a sequence of AllInOneBlocks, whatever its class and package."""
    blocks = getattr(module, "module_list", None)
    return (
        isinstance(blocks, nn.ModuleList)
        and len(blocks) > 0
        and isinstance(getattr(module, "conditions", None), list)
        and any(type(block).__name__ == "AllInOneBlock" for block in blocks)
    )


def read_flow(flow: nn.Module, name: str, forward: Callable[..., Any] | None = None) -> FlowReading:
    """Return the shape of a flow and which condition it takes.

    Args:
        flow: a `SequenceINN`, or a module with the same attributes.
        name: for error messages.
        forward: the flow's own forward, if `flow` would not call it.

    Raises:
        UnsupportedFlowError: fastbgad's coupling layers do not compute the same; the message says which block and why.
    """
    blocks = list(cast(nn.ModuleList, flow.module_list))
    conditions = cast(list[int | None], flow.conditions)
    specs = [_read_block(block, len(blocks), f"{name}.module_list.{i}") for i, block in enumerate(blocks)]
    if not all(spec.hard_permutation for spec in specs):  # a rotation may move whole channels by chance
        specs = [replace(spec, hard_permutation=False) for spec in specs]
    for i, (spec, condition) in enumerate(zip(specs, conditions, strict=True)):
        if spec != specs[0]:
            raise UnsupportedFlowError(f"{name}.module_list.{i} is {spec}, but the first block is {specs[0]}")
        if condition != conditions[0]:
            raise UnsupportedFlowError(
                f"{name}.module_list.{i} takes condition {condition}, the first block {conditions[0]}; all blocks must "
                "take the same one"
            )
    if (conditions[0] is None) != (specs[0].condition_channels == 0):
        raise UnsupportedFlowError(f"{name} has blocks with a condition but a sequence without, or the reverse")
    reading = FlowReading(specs[0], conditions[0])
    _confirm(flow, reading, name, forward or flow.forward)
    return reading


def signature(flow: nn.Module) -> tuple[Any, ...]:
    """Return everything that makes it necessary to read a flow again once it changes; cheap enough for every call."""
    return tuple(
        (
            type(block),
            block.clamp,
            block.GIN,
            block.householder,
            block.reverse_pre_permute,
            block.w_perm.dim(),
            *((type(layer), getattr(layer, "out_features", 0)) for layer in block.subnet.children()),
        )
        for block in cast(Any, flow.module_list)
    )


def weights_of(flow: nn.Module, matrix: Callable[[Tensor, torch.dtype], Tensor]) -> list[CouplingWeights]:
    """Return every block's tensors; `matrix(index, dtype)` gives the matrix of a permutation stored as an index."""
    layers = []
    for block in cast(Any, flow.module_list):
        first, _, second = block.subnet
        w_perm = block.w_perm
        layers.append(
            CouplingWeights(
                first.weight,
                first.bias,
                second.weight,
                second.bias,
                block.global_scale.squeeze(0),
                block.global_offset.squeeze(0),
                w_perm if w_perm.dim() == 2 else matrix(w_perm, first.weight.dtype),
            )
        )
    return layers


def _read_block(block: Any, coupling_layers: int, name: str) -> FlowSpec:
    def unsupported(reason: str) -> UnsupportedFlowError:
        return UnsupportedFlowError(f"{name} ({type(block).__name__}) cannot be accelerated: {reason}")

    missing = [attribute for attribute in _BLOCK_ATTRIBUTES if not hasattr(block, attribute)]
    if missing:
        raise unsupported(f"it is not an AllInOneBlock as FrEIA and anomalib have it; it lacks {', '.join(missing)}")
    if block.GIN:
        raise unsupported("GIN coupling subtracts the mean log-scale (gin_block=True)")
    if block.householder:
        raise unsupported("its permutation is learned (learned_householder_permutation > 0)")
    if block.reverse_pre_permute:
        raise unsupported("it permutes before the coupling as well (reverse_permutation=True)")
    if block.input_rank:
        raise unsupported(f"it works on {block.input_rank}-dimensional maps; only rows [N, C] are supported")
    subnet = block.subnet
    kinds = [type(layer) for layer in subnet] if isinstance(subnet, nn.Sequential) else [type(subnet)]
    if kinds != [nn.Linear, nn.ReLU, nn.Linear]:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise unsupported(f"its subnet is [{names}]; only Linear, ReLU, Linear is supported")
    if subnet[0].bias is None or subnet[2].bias is None:
        raise unsupported("a linear layer of its subnet has no bias")
    try:
        spec = FlowSpec(
            channels=block.in_channels,
            condition_channels=block.condition_channels,
            coupling_layers=coupling_layers,
            clamp=float(block.clamp),
            clamp_form=_clamp_form(block),
            global_affine=_global_affine(block),
            hard_permutation=block.w_perm.dim() == 1 or is_permutation_matrix(block.w_perm),
        )
    except (ConfigError, _UnknownFormError) as reason:
        raise unsupported(str(reason)) from None
    if subnet[0].out_features != spec.hidden_channels:
        raise unsupported(
            f"its subnet has {subnet[0].out_features} hidden units; only 2 (C1 + P) = {spec.hidden_channels} will do"
        )
    if block.w_perm.dim() == 2 and not _is_orthogonal(block.w_perm, block.w_perm_inv):
        raise unsupported("w_perm is not orthogonal, or w_perm_inv is not its transpose")
    return spec


class _UnknownFormError(Exception):
    """The clamp or the activation of the global scale is none that fastbgad knows."""


def _clamp_form(block: Any) -> ClampForm:
    """Return the form of the clamp, recognized by the block's results for numbers that tell the forms apart."""
    a = torch.tensor([[-30.0, -5.0, 2.0, 10.0, 40.0]], dtype=torch.float64)
    x2 = torch.ones_like(a)
    y2, _ = block._affine(x2, torch.cat([a, torch.zeros_like(a)], dim=1))  # which may write to what it is given
    s, clamp = torch.log(y2), float(block.clamp)
    forms = {"tanh": clamp * torch.tanh(0.1 * a), "scaled_tanh": clamp * torch.tanh(0.1 * a / clamp)}
    matching = [form for form, expected in forms.items() if torch.allclose(s, expected, rtol=1e-9, atol=0)]
    if len(matching) != 1 and clamp != 1:  # at clamp = 1 both forms are the same
        raise _UnknownFormError("its log-scale is neither clamp * tanh(a) nor clamp * tanh(a / clamp)")
    return cast(ClampForm, matching[0])


def _global_affine(block: Any) -> GlobalAffine:
    """Return the activation of the global scale, recognized likewise."""
    parameter = torch.tensor([[-3.0, 0.0, 1.0, 6.0]], dtype=torch.float64)
    g = block.global_scale_activation(parameter)
    for kind in get_args(GlobalAffine):
        if torch.allclose(g, reference.flow.global_affine_scale(parameter, kind), rtol=1e-9, atol=0):
            return cast(GlobalAffine, kind)
    raise _UnknownFormError(f"its global scale is activated by none of {', '.join(get_args(GlobalAffine))}")


def _is_orthogonal(w: Tensor, inverse: Tensor) -> bool:
    w = w.detach().float()
    near = 8 * torch.finfo(inverse.dtype).eps * len(w) ** 0.5 + 1e-4
    identity = torch.eye(len(w), device=w.device)
    return bool((w @ w.T - identity).abs().max() < near and (inverse.detach().float() - w.T).abs().max() < near)


@torch.no_grad()
def _confirm(flow: nn.Module, reading: FlowReading, name: str, forward: Callable[..., Any]) -> None:
    """Raise `UnsupportedFlowError` unless the flow and the reference agree on a few rows."""
    spec = reading.spec
    layers = weights_of(flow, permutation_matrix)
    first = layers[0].w1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_ROWS, spec.channels, generator=generator).to(first)
    condition = torch.rand(PROBE_ROWS, spec.condition_channels, generator=generator).to(first)
    conditions = None if reading.condition is None else [condition] * (reading.condition + 1)
    with warnings.catch_warnings(), torch.autocast(first.device.type, enabled=False):
        warnings.simplefilter("ignore")
        z, log_det = forward(x, conditions)
        z = z[0] if isinstance(z, tuple) else z
    exact, exact_det = x.double(), x.new_zeros(PROBE_ROWS, dtype=torch.float64)
    for layer in layers:
        double = CouplingWeights(*(tensor.double() for tensor in layer))
        dense = condition.double() if conditions is not None else None
        exact, added = reference.flow.coupling_forward(exact, double, spec, dense)
        exact_det = exact_det + added
    if not (torch.isfinite(z).all() and torch.isfinite(exact).all()):
        raise UnsupportedFlowError(f"{name} cannot be accelerated: its parameters give values that are not finite")
    for result, expected in ((z, exact), (log_det, exact_det)):
        error = (result.double() - expected).abs().max() / expected.square().mean().sqrt().clamp(min=1e-3)
        if not error <= PROBE_TOLERANCE[first.dtype]:
            raise UnsupportedFlowError(
                f"{name} cannot be accelerated: it computes something else than its blocks say (off by {error:.1e} of "
                f"what {spec} gives)"
            )
