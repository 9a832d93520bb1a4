"""Launch every kernel in every mode once, at its main sizes, on fresh random numbers, against float64.

Outputs hold NaN before they are written, so a row that no program wrote shows. Tolerances are relative errors of whole
tensors; those of gradients allow for the hidden units within rounding of zero, whose gradient is one of two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.flow_spec import CouplingWeights, FlowSpec
from fastbgad.kernels.flow.weights import FlowWeights
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import Geometry, PositionalRows, boundary, flow_forward, log_likelihood, score_map, spp_loss
from fastbgad.ops.flow.kernel_weights import flow_pack, plain_pack, stacked_codes
from fastbgad.system.environment import machine, versions
from tests.flows import double, lively_flow

from . import carried
from .case import whole_error
from .context import Context, Found, Items

# Channels and side of the levels of a 1024-pixel image; rows of a training step.
LEVELS = ((40, 256), (72, 128), (200, 64))
TRAINING_ROWS = 4096
WIDE_CHANNELS = 512
MANY_ROWS = 1_000_000

LP = {"float16": 5e-5, "float32": 1e-5}
GRADIENT = {"float16": 3e-2, "float32": 1e-3}
ROWS = 1e-5

Pairs = Sequence[tuple[str, Tensor, Callable[[], Tensor], float]]  # name, value, the exact one, tolerance


def items(context: Context) -> Items:
    """Return all checks, those that most depends on first."""
    device = context.device
    levels = ((9, 5), (16, 4)) if context.tiny else LEVELS
    steps = 40 if context.tiny else TRAINING_ROWS
    many = 5000 if context.tiny else MANY_ROWS
    wide = 24 if context.tiny else WIDE_CHANNELS
    pixels = 20 if context.tiny else 1024
    layers = 2 if context.tiny else 8
    checks: dict[str, Callable[[], Pairs]] = {}
    for channels, side in levels:
        case = partial(_Flow, channels, side, steps, layers, device)
        for precision in ("float16", "float32"):
            where = f"C={channels} {precision}"
            checks[f"flow forward, maps, {where}"] = partial(_inference, case, "raster", precision)
            checks[f"flow backward, gathered rows, {where}"] = partial(_gradients, case, "gathered", precision)
    for channels, side in levels:
        case = partial(_Flow, channels, side, steps, layers, device)
        for kind in ("gathered", "positions", "dense", "none"):
            checks[f"flow forward, {kind}, C={channels} float16"] = partial(_inference, case, kind, "float16")
        checks[f"flow forward, latent of maps, C={channels} float16"] = partial(
            _inference, case, "raster", "float16", return_z=True
        )
        checks[f"flow backward, dense, C={channels} float16"] = partial(_gradients, case, "dense", "float16")
        checks[f"flow pack, C={channels}"] = partial(_packing, case)
    first = partial(_Flow, *levels[0], steps, layers, device)
    options: dict[str, Any]
    for name, options in (
        ("hard permutation", {"hard_permutation": True}),
        ("scaled tanh", {"clamp_form": "scaled_tanh"}),
        ("SIGMOID", {"global_affine": "SIGMOID"}),
        ("EXP", {"global_affine": "EXP"}),
    ):
        checks[f"flow forward, {name}"] = partial(_inference, partial(first, **options), "gathered", "float16")
        checks[f"flow backward, {name}"] = partial(_gradients, partial(first, **options), "gathered", "float16")
    checks["flow backward, recomputed"] = partial(_gradients, first, "gathered", "float16", recompute=True)
    wide_flow = partial(_Flow, wide, 4 if context.tiny else 32, steps // 4, 2, device)
    for precision in ("float16", "float32"):
        checks[f"wide flow forward, C={wide} {precision}"] = partial(_inference, wide_flow, "gathered", precision)
        checks[f"wide flow backward, C={wide} {precision}"] = partial(_gradients, wide_flow, "gathered", precision)
    for rows, channels in ((many, 40), (steps, 200), (77, 9)):
        checks[f"log-likelihood, {rows} x {channels}"] = partial(_log_likelihood, rows, channels, device)
    for rows in (steps, many):
        checks[f"boundary, {rows} rows"] = partial(_boundary, rows, device)
        for form, reduction, focal, push in (
            ("logsigmoid", "mean", True, True),
            ("nll", "sum", False, True),
            ("logsigmoid", "sum", True, False),
        ):
            name = f"loss, {rows} rows, {form} {reduction}{' focal' * focal}{'' if push else ' without anomalies'}"
            checks[name] = partial(_loss, rows, device, ml_form=form, reduction=reduction, focal=focal, push=push)
    for batch in (1, 4):
        checks[f"anomaly map, {batch} of {pixels} pixels"] = partial(_score_map, batch, pixels, device)
    found: dict[str, Callable[[], Found]] = {"environment": partial(environment, context)}
    found |= {name: partial(check, context, compute) for name, compute in checks.items()}
    if device.type == "cuda":
        found["training steps, captured and replayed"] = partial(_captured, context)
    return found


def environment(context: Context) -> Found:
    """Return what the run is made on, and the compile cache that it carries."""
    found: Found = {
        "outcome": "right",
        "machine": machine(),
        "versions": versions(),
        "compiler": carried.compiler(),
        "carried": carried.describe(),
    }
    if context.driver == "cuda":
        from fastbgad.kernels.tune import output_of

        found["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["gpu"] = torch.cuda.get_device_name()
    return found


def check(context: Context, compute: Callable[[], Pairs]) -> Found:
    """Return "right" or "wrong", with the error of every result and the seed of the numbers."""
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    with _poisoned():
        results = compute()
    if context.device.type == "cuda":
        torch.cuda.synchronize()
    if context.launch_only or not context.values:
        return {"outcome": "right", "unchecked": True}
    errors, wrong = {}, []
    for name, value, exact, tolerance in results:
        errors[name] = whole_error(value, exact().double())
        if not errors[name] < tolerance:
            wrong.append(f"{name} is off by {errors[name]:.1e}, more than {tolerance:.0e}")
    found: Found = {"outcome": "wrong" if wrong else "right", "errors": errors, "seed": seed}
    return found | ({"message": "; ".join(wrong)} if wrong else {})


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill memory that is allocated with NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class _Flow:
    """A flow and rows of one kind, and the reference's view of them."""

    def __init__(
        self, channels: int, side: int, rows: int, layers: int, device: torch.device, kind: str, **spec: Any
    ) -> None:
        self.spec = FlowSpec(channels, 0 if kind == "none" else 128, layers, **spec)
        self.flow: ConditionalFlow = lively_flow(self.spec, seed=int(torch.randint(1000, ())), gain=1.0).to(device)
        area = side * side
        self.rows: Tensor | None = None
        self.condition: PositionalRows | Tensor | None = None
        self.index: Tensor | None = None  # of the rows that the reference sees
        if kind == "raster":
            self.condition = PositionalRows(side, side)
            self.x = torch.randn(area, channels, device=device)
        elif kind == "gathered":
            self.condition = PositionalRows(side, side)
            self.x = torch.randn(area, channels, device=device)
            self.rows = self.index = torch.randint(0, area, (rows,), device=device)
        else:
            self.x = torch.randn(rows, channels, device=device)
            if kind == "positions":
                self.condition = PositionalRows(side, side, torch.randint(0, area, (rows,), device=device))
            elif kind == "dense":
                self.condition = torch.randn(rows, 128, device=device)

    def exact(self, layers: Sequence[CouplingWeights]) -> tuple[Tensor, Tensor, Tensor]:
        """Return lp, log_det and z in float64, 8192 rows at a time."""
        x, dense = self.x.double(), None
        if isinstance(self.condition, PositionalRows):
            dense = self.condition.dense(len(x), torch.float64, x.device)
        elif self.condition is not None:
            dense = self.condition.double()
        if self.index is not None:
            x, dense = x[self.index], None if dense is None else dense[self.index]
        parts = []
        for start in range(0, len(x), 8192):
            part = slice(start, start + 8192)
            z, log_det = reference.flow_forward(x[part], layers, self.spec, None if dense is None else dense[part])
            parts.append((reference.log_likelihood(z, log_det), log_det, z))
        lp, log_det, z = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return lp, log_det, z


def _inference(make: Callable[[str], _Flow], kind: str, precision: Any, return_z: bool = False) -> Pairs:
    case = make(kind)
    with torch.no_grad():
        out = flow_forward(
            case.x,
            case.flow.weights(),
            case.spec,
            case.condition,
            rows=case.rows,
            return_z=return_z,
            impl="triton",
            matmul_precision=precision,
        )
    layers = [CouplingWeights(*(t.detach() for t in layer)) for layer in double(case.flow.weights())]
    results: list[tuple[str, Tensor, Callable[[], Tensor], float]] = [
        ("lp", out.log_likelihood, lambda: case.exact(layers)[0], LP[precision])
    ]
    if out.z is not None:
        results.append(("z", out.z, lambda: case.exact(layers)[2], 10 * LP[precision]))
    return results


def _gradients(make: Callable[[str], _Flow], kind: str, precision: Any, recompute: bool = False) -> Pairs:
    case = make(kind)
    weights = case.flow.weights()
    names = [name for name in CouplingWeights._fields if name != "w_perm"]
    leaves = [getattr(layer, name) for layer in weights for name in names]
    out = flow_forward(
        case.x,
        weights,
        case.spec,
        case.condition,
        rows=case.rows,
        impl="triton",
        matmul_precision=precision,
        recompute=recompute,
    )
    upstream = torch.rand_like(out.log_likelihood)
    grads = torch.autograd.grad(out.log_likelihood, leaves, upstream)
    value = torch.cat([g.reshape(-1) for g in grads])

    def exact() -> Tensor:
        layers = double(weights)
        lp = case.exact(layers)[0]
        exact_leaves = [getattr(layer, name) for layer in layers for name in names]
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(lp, exact_leaves, upstream.double())])

    def exact_lp() -> Tensor:
        return case.exact(double(weights))[0].detach()

    return [
        ("lp", out.log_likelihood.detach(), exact_lp, LP[precision]),
        ("gradients", value, exact, GRADIENT[precision]),
    ]


def _packing(make: Callable[[str], _Flow]) -> Pairs:
    case = make("gathered")
    assert isinstance(case.condition, PositionalRows)
    geometry = Geometry.of(case.condition, "float16")
    spec = case.spec
    weights = [tensor.detach() for layer in case.flow.weights() for tensor in layer]
    codes = stacked_codes(geometry.height, geometry.width, spec.condition_channels, case.x.device)
    shape = (geometry.height, geometry.width, spec.channels, spec.hidden_channels, spec.condition_channels)
    call = (weights, codes, *shape, False, spec.global_affine, False, True)
    packed, plain = flow_pack(*call), plain_pack(*call)
    return [
        (name, value, lambda truth=truth: truth, 1e-3 if name == "tables" else 1e-5)
        for name, value, truth in zip(FlowWeights._fields, packed, plain, strict=True)
        if truth.numel()
    ]


def _captured(context: Context) -> Found:
    """Compare the weights that captured steps leave with those of the same steps launched one by one."""
    from fastbgad.train.graph import CapturedSteps

    from .training_cases import TrainingStep

    channels, side = LEVELS[0]
    flows = []
    for capture in (True, False):
        step = TrainingStep(channels, side, TRAINING_ROWS, 8, context.device, True)
        for group in step.optimizer.param_groups:
            group["lr"] = torch.tensor(1e-3, device=context.device)
        take: Callable[[Tensor, bool], None] = CapturedSteps(step.on_rows) if capture else step.on_rows
        rows = step.rows
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # the default stream cannot be captured
            for number in range(8):
                take(rows.roll(number), False)
        torch.cuda.synchronize()
        flows.append(torch.cat([p.detach().reshape(-1) for p in step.parameters]))
    error = whole_error(flows[0], flows[1].double())
    right = error < 1e-5
    message = "" if right else f"parameters after 8 steps differ by {error:.1e}"
    return {"outcome": "right" if right else "wrong", "errors": {"parameters": error}, "message": message}


def _rows(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return 4 * torch.randn(count, device=device) - 3, torch.rand(count, device=device) < 0.1


def _log_likelihood(rows: int, channels: int, device: torch.device) -> Pairs:
    z = torch.randn(rows, channels, device=device, requires_grad=True)
    log_det = (channels * torch.randn(rows, device=device)).requires_grad_()
    upstream = torch.randn(rows, device=device)
    lp = log_likelihood(z, log_det, impl="triton")
    grads = torch.autograd.grad(lp, (z, log_det), upstream)
    exact = [t.detach().double().requires_grad_() for t in (z, log_det)]

    def truth(which: int) -> Tensor:
        value = reference.log_likelihood(*exact)
        return value.detach() if which == 0 else torch.autograd.grad(value, exact, upstream.double())[which - 1]

    names = ("lp", "gradient of z", "gradient of log_det")
    values = (lp.detach(), *grads)
    return [(name, value, partial(truth, i), ROWS) for i, (name, value) in enumerate(zip(names, values, strict=True))]


def _boundary(rows: int, device: torch.device) -> Pairs:
    lp, anomalous = _rows(rows, device)
    found = boundary(lp, anomalous, impl="triton")

    def exact() -> Tensor:
        return torch.stack(reference.boundary(lp.double(), anomalous, 0.01, 0.1, 10.0)[:2])

    return [("boundary", torch.stack([found.b_n, found.b_a]), exact, 1e-6)]


def _loss(rows: int, device: torch.device, **options: Any) -> Pairs:
    lp, anomalous = _rows(rows, device)
    lp.requires_grad_()
    terms = spp_loss(lp, anomalous, 40, impl="triton", **options)
    (gradient,) = torch.autograd.grad(terms.total, lp)
    exact = lp.detach().double().requires_grad_()

    def truth(gradients: bool) -> Tensor:
        found = reference.spp_loss(exact, anomalous, 40, **options)
        if gradients:
            return torch.autograd.grad(found.total, exact)[0]
        return torch.stack([term.detach() for term in found[:4]])

    values = torch.stack([term.detach() for term in terms[:4]])
    # A row within rounding of the boundary violates in one precision and not in the other.
    return [("terms", values, partial(truth, False), 1e-4), ("gradient", gradient, partial(truth, True), 1e-2)]


def _score_map(batch: int, pixels: int, device: torch.device) -> Pairs:
    sides = [max(1, pixels // stride) for stride in (4, 8, 16)]
    levels = [torch.randn(batch, side, side, device=device) - 2 for side in sides]
    level_max, offset = torch.full((3,), 0.5, device=device), torch.tensor(3.0, device=device)
    found = score_map(levels, (pixels, pixels), level_max, offset, impl="triton")

    def exact() -> Tensor:
        lp = [level.double().cpu() for level in levels]
        truth = reference.score_map(lp, (pixels, pixels), level_max.double().cpu(), offset.double().cpu())
        return truth.to(device)

    return [
        ("map", found[0], exact, 1e-5),
        ("image score", found[1], lambda: exact().amax(dim=(1, 2)), 1e-5),
    ]
