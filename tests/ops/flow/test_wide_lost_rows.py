"""Rows that the wide flow cannot compute: NaN, never a wrong number, and nobody else notices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastbgad.flow_spec import CouplingWeights
from fastbgad.ops import MatmulPrecision, PositionalRows
from tests.flows import whole_error
from tests.wide_flows import PRECISIONS, Case, interpreter_tiles

ROWS, CHANNELS, HALF = 12, 9, 5  # HALF is C1


@pytest.fixture(autouse=True)
def _tiles(device: torch.device, tmp_path: Path, poisoned: None) -> Iterator[None]:
    yield from interpreter_tiles(device, tmp_path)


def check(case: Case, precision: MatmulPrecision, bad: Tensor, spoil: Callable[[], None]) -> None:
    """After `spoil` the rows `bad` [N] are lost: NaN, and for the gradients as if they had not been there.

    The other rows keep their bits.
    """
    rows, channels = case.x.shape
    upstream = [torch.randn(shape, device=bad.device) for shape in ((rows,), (rows,), (rows, channels))]
    without = [tensor.masked_fill(bad[:, None] if tensor.dim() == 2 else bad, 0) for tensor in upstream]
    good = case.run(precision)
    expected = case.gradients(good, without)
    for tensor in upstream:
        tensor[bad] = torch.nan  # a loss of a NaN has a NaN gradient
    spoil()
    for recompute in (False, True):
        got = case.run(precision, recompute=recompute, chunk_rows=rows)
        for value, truth in zip(got, good, strict=True):
            assert value is not None
            assert value[bad].isnan().all()
            assert torch.equal(value[~bad], truth[~bad])
        for name, value in case.gradients(got, upstream).items():
            assert whole_error(value, expected[name]) < 1e-6, name
    with torch.no_grad():
        lp, log_det, _ = case.run(precision, return_z=False)
    assert torch.equal(lp.isnan(), bad)
    assert torch.equal(log_det.isnan(), bad)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["gathered", "dense"])
def test_unusable_rows(device: torch.device, precision: MatmulPrecision, kind: str) -> None:
    """Features, conditions and places."""
    case = Case(device, 30, 41, kind, coupling_layers=3)
    bad = torch.zeros(30, dtype=torch.bool, device=device)
    bad[[3, 7, 11, 20, 21]] = True

    def spoil() -> None:
        x = case.x.detach().clone()
        x[3, 0], x[7, 40], x[11, 5] = torch.nan, torch.nan, torch.inf
        case.x = x.requires_grad_()
        if isinstance(case.condition, Tensor):
            condition = case.condition.detach().clone()
            condition[20, 7], condition[21, 0] = torch.nan, 65505 if precision == "float16" else torch.inf
            case.condition = condition.requires_grad_()
        elif isinstance(case.condition, PositionalRows) and case.condition.index is not None:
            case.condition.index[20], case.condition.index[21] = 77, -1

    check(case, precision, bad, spoil)


def rotated(layer: CouplingWeights) -> CouplingWeights:
    """Mixes the first two channels half and half and leaves the others alone."""
    w_perm = torch.eye(CHANNELS, device=layer.w_perm.device)
    w_perm[:2, :2] = math.sqrt(0.5) * torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    return layer._replace(w_perm=w_perm)


def silent(layer: CouplingWeights) -> CouplingWeights:
    """No hidden unit of a row whose first channel is large and positive is active, and v is small again."""
    w1 = layer.w1.clone()
    w1[:, 0] = -1
    return layer._replace(w1=w1, global_scale=torch.full_like(layer.global_scale, -5.0))


# What leaves the range of float16, by a change of the first two layers, and the features of the row.
OVERFLOWS: dict[str, tuple[Callable[[CouplingWeights], CouplingWeights], ...]] = {
    "hidden": (lambda layer: layer._replace(w1=300 * layer.w1, w2=layer.w2 / 300), lambda layer: layer),
    "later hidden": (lambda layer: layer, lambda layer: layer._replace(w1=300 * layer.w1, w2=layer.w2 / 300)),
    "a": (lambda layer: layer._replace(w2=300 * layer.w2, global_scale=layer.global_scale - 5), lambda layer: layer),
    "a_s alone": (
        lambda layer: layer._replace(w2=torch.cat([300 * layer.w2[: CHANNELS - HALF], layer.w2[CHANNELS - HALF :]])),
        lambda layer: layer,
    ),
    "v": (lambda layer: layer._replace(global_scale=layer.global_scale + 400), lambda layer: layer),
    "x1 alone": (rotated, silent),
}


# A hard permutation adds up nothing.
@pytest.mark.parametrize(("what", "hard"), [*((what, False) for what in OVERFLOWS), ("hidden", True), ("v", True)])
def test_overflow_on_the_way(device: torch.device, what: str, hard: bool) -> None:
    """In float16; in float32 the same row is an ordinary one."""
    case = Case(device, ROWS, CHANNELS, "dense", coupling_layers=3, hard_permutation=hard)
    first, second = OVERFLOWS[what]
    weights = [first(case.weights[0]), second(case.weights[1]), case.weights[2]]
    case.weights = [
        CouplingWeights(*(t.detach().requires_grad_(name != "w_perm") for name, t in layer._asdict().items()))
        for layer in weights
    ]
    bad = torch.arange(ROWS, device=device) == 4

    def spoil() -> None:
        x = case.x.detach().clone()
        if what == "x1 alone":
            # v = g x + offset of the first layer is just inside, W_perm v is not
            g = 0.1 * torch.nn.functional.softplus(case.weights[0].global_scale.detach(), beta=0.5)
            x[4] = 0
            x[4, :2] = 60000 / g[:2]
        else:
            x[4] *= 2000
        case.x = x.requires_grad_()

    check(case, "float16", bad, spoil)
    lp, _, z = case.run("float32")
    assert lp.isfinite().all()
    assert z is not None
    assert z.isfinite().all()


def test_the_largest_feature(device: torch.device) -> None:
    """65504 is one that float16 can hold."""
    case = Case(device, 8, 9, coupling_layers=1)
    with torch.no_grad():
        case.weights = [
            layer._replace(w1=layer.w1 * 1e-3, global_scale=layer.global_scale * 0) for layer in case.weights
        ]
        case.x[1, 3], case.x[2, 3], case.x[5, 8] = 65504, 65505, -65505
        lp, _, z = case.run("float16")
        exact = case.run("float32")[0]
    usable = torch.ones(8, dtype=torch.bool, device=device)
    usable[[2, 5]] = False
    assert torch.equal(lp.isfinite(), usable)
    assert z is not None
    assert torch.equal(z.isfinite().all(dim=1), usable)
    assert whole_error(lp[usable], exact[usable]) < 1e-3


@pytest.mark.parametrize("hard", [False, True])
def test_lp_beyond_float32(device: torch.device, hard: bool) -> None:
    """|z|^2 alone overflows: the same as any other lost row."""
    case = Case(device, ROWS, CHANNELS, coupling_layers=2, hard_permutation=hard)
    bad = torch.arange(ROWS, device=device) == 4

    def spoil() -> None:
        x = case.x.detach().clone()
        x[4] = 1e25
        case.x = x.requires_grad_()

    check(case, "float32", bad, spoil)


@pytest.mark.parametrize("name", ["w1", "b1", "w2"])
@pytest.mark.parametrize("value", [-7e4, math.nan])
def test_a_weight_that_does_not_fit(device: torch.device, name: str, value: float) -> None:
    """Every row is lost; a ReLU would hide it in some."""
    case = Case(device, ROWS, CHANNELS, "raster", coupling_layers=2)
    with torch.no_grad():
        getattr(case.weights[1], name).view(-1)[0] = value
        for precision in PRECISIONS:
            fits = precision == "float32" and not math.isnan(value)
            lp, log_det, z = case.run(precision)
            assert all(t.isfinite().all() if fits else t.isnan().all() for t in (lp, log_det, z))


@pytest.mark.parametrize(("gain", "fits"), [(30.0, True), (200.0, False)])
def test_a_gradient_that_overflows_shows(device: torch.device, gain: float, fits: bool) -> None:
    """A state that fits and a gradient that does not: not finite, where a clamped one would pass for a gradient."""
    case = Case(device, ROWS, CHANNELS, coupling_layers=3)
    for layer in case.weights:
        for tensor in (layer.b1, layer.b2, layer.global_offset):
            tensor.detach().zero_()
        layer.global_scale.detach().fill_(10 * gain)  # g = gain
    case.x = (case.x.detach() / gain**3).requires_grad_()
    z = case.run("float16")[2]
    assert z is not None
    assert z.isfinite().all()
    [gradient] = torch.autograd.grad(z.sum(), [case.x])
    [exact] = torch.autograd.grad(case.run("float32")[2].sum(), [case.x])
    if fits:
        assert whole_error(gradient, exact) < 1e-2
    else:
        assert exact.isfinite().all()
        assert not gradient[:, :HALF].isfinite().any()  # what comes through the first layer's subnet
