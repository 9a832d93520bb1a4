"""The wide flow (a library's products around the coupling kernels) against the oracle in float64.

The kernels do not care how wide the flow is, so most tests take few channels. Gradients are judged as whole tensors and
with the same hidden units active. Rows that are lost: test_wide_lost_rows.py; what surrounds the arithmetic:
test_wide_operator.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbgad.flow_spec import CouplingWeights
from fastbgad.ops import MatmulPrecision, PositionalRows
from tests.flows import whole_error
from tests.wide_flows import BUDGET, PRECISIONS, Case, interpreter_tiles, run_wide


@pytest.fixture(autouse=True)
def _tiles(device: torch.device, tmp_path: Path, poisoned: None) -> Iterator[None]:
    yield from interpreter_tiles(device, tmp_path)


@pytest.fixture
def _few_columns(device: torch.device, tmp_path: Path, _tiles: None) -> Iterator[None]:
    yield from interpreter_tiles(device, tmp_path, columns=8)


@pytest.fixture
def _many_columns(device: torch.device, tmp_path: Path, _tiles: None) -> Iterator[None]:
    yield from interpreter_tiles(device, tmp_path, columns=256)


def check(case: Case, precision: MatmulPrecision, budget: Mapping[str, float], **options: Any) -> None:
    """lp, log_det, z and every gradient from all three of them."""
    got = case.run(precision, **options)
    exact, inputs = case.exact(precision)
    upstream = [torch.randn_like(tensor) for tensor in got]
    gradients = case.gradients(got, upstream)
    exact_gradients = torch.autograd.grad(exact, list(inputs.values()), [tensor.double() for tensor in upstream])
    lp, log_det, z = got
    assert whole_error(lp, exact[0]) < budget["lp"]
    # log_det is a sum with changing signs: what matters is its share of lp.
    assert whole_error(lp + (log_det - exact[1]) / case.spec.channels, lp) < budget["lp"]
    assert whole_error(z, exact[2]) < budget["z"]
    require_close(gradients, inputs, exact_gradients, budget["gradient"])


def require_close(
    gradients: Mapping[str, Tensor], inputs: Mapping[str, Tensor], exact: tuple[Tensor, ...], limit: float
) -> None:
    for name, truth in zip(inputs, exact, strict=True):
        assert gradients[name].dtype == torch.float32
        assert whole_error(gradients[name], truth) < limit, name


@pytest.mark.equivalence
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["none", "dense", "gathered", "raster"])
@pytest.mark.parametrize(("rows", "channels"), [(1, 6), (63, 41)])
def test_forward_and_gradients(
    device: torch.device, precision: MatmulPrecision, kind: str, rows: int, channels: int
) -> None:
    budget = dict(BUDGET[precision])
    if channels == 6 and precision == "float16":
        budget["lp"] = 5e-4  # one row of six channels: no roundings that could cancel
    check(Case(device, rows, channels, kind, coupling_layers=3), precision, budget)


@pytest.mark.equivalence
@pytest.mark.usefixtures("_many_columns")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_wide(device: torch.device, precision: MatmulPrecision) -> None:
    """As many channels as this path is for."""
    check(Case(device, 257, 300, "gathered", coupling_layers=2), precision, BUDGET[precision])


@pytest.mark.usefixtures("_few_columns")
@pytest.mark.parametrize(
    ("form", "affine", "hard", "precision"),
    [
        ("tanh", "SOFTPLUS", True, "float16"),
        ("scaled_tanh", "SIGMOID", False, "float16"),
        ("scaled_tanh", "SIGMOID", True, "float32"),
        ("tanh", "EXP", True, "float32"),
        ("scaled_tanh", "EXP", False, "float32"),
    ],
)
def test_variants(device: torch.device, form: str, affine: str, hard: bool, precision: MatmulPrecision) -> None:
    """Of the flow, of the chunks of rows, and in tiles narrower than the rows."""
    options = {"clamp": 1.3, "clamp_form": form, "global_affine": affine, "hard_permutation": hard}
    case = Case(device, 20, 41, "dense", coupling_layers=2, **options)
    check(case, precision, BUDGET[precision])
    check(case, precision, BUDGET[precision], recompute=True, chunk_rows=15)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("hard", [False, True])
def test_without_z(device: torch.device, precision: MatmulPrecision, hard: bool) -> None:
    """lp alone needs no last permutation, forward or back; one layer has no permutation at all."""
    for layers in (1, 2):
        case = Case(device, 20, 41, "gathered", coupling_layers=layers, hard_permutation=hard)
        lp, log_det, z = case.run(precision, return_z=False)
        assert z is None
        with torch.no_grad():
            inference = case.run(precision)
        assert torch.equal(lp, inference[0])
        assert torch.equal(log_det, inference[1])
        exact, inputs = case.exact(precision)
        exact_gradients = torch.autograd.grad(exact[0].sum(), list(inputs.values()))
        gradients = case.gradients([lp], [torch.ones_like(lp)])
        require_close(gradients, inputs, exact_gradients, BUDGET[precision]["gradient"])


@pytest.mark.parametrize("kind", ["dense", "gathered", "raster"])
def test_chunks(device: torch.device, kind: str) -> None:
    """Inference does not depend on the chunk, and maps in raster order may begin anywhere in it."""
    case = Case(device, 42, 9, kind, coupling_layers=3)
    if kind == "raster":
        case.condition = PositionalRows(2, 7, channels=8)
    with torch.no_grad():
        whole = case.run("float32")
        parts = case.run("float32", chunk_rows=11)
    for value, expected in zip(parts, whole, strict=True):
        assert whole_error(value, expected) < 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_of_single_outputs(device: torch.device, precision: MatmulPrecision) -> None:
    """Outputs that take no part in the loss have no gradient to pass on."""
    case = Case(device, 20, 9, coupling_layers=2)
    exact, inputs = case.exact(precision)
    for i in range(3):
        [value] = torch.autograd.grad(case.run(precision)[i].sum(), [case.x])
        [truth] = torch.autograd.grad(exact[i].sum(), [inputs["x"]], retain_graph=True)
        assert whole_error(value, truth) < BUDGET[precision]["gradient"]


def test_permutation_is_accurate(device: torch.device) -> None:
    """With a subnet that says 0 only the permutations are left: in plain float16 they would be off by 2e-4."""
    case = Case(device, 20, 41, coupling_layers=3)
    case.weights = [layer._replace(w2=layer.w2 * 0, b2=layer.b2 * 0) for layer in case.weights]
    _, _, z = case.run("float16")
    exact, inputs = case.exact("float16")
    assert z is not None
    assert whole_error(z, exact[2]) < 5e-6
    upstream = torch.randn_like(z)
    [value] = torch.autograd.grad(z, [case.x], upstream)
    [truth] = torch.autograd.grad(exact[2], [inputs["x"]], upstream.double())
    assert whole_error(value, truth) < 5e-6


@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_small_and_large_upstream_gradients(device: torch.device, size: float) -> None:
    """Gradients are scaled by a power of two before they are cast, and back."""
    case = Case(device, 40, 41, coupling_layers=3)
    exact, inputs = case.exact("float16")
    upstream = torch.rand(40, device=device) * size
    exact_gradients = torch.autograd.grad(exact[0], list(inputs.values()), upstream.double())
    gradients = case.gradients(case.run("float16")[:1], [upstream])
    require_close(gradients, inputs, exact_gradients, BUDGET["float16"]["gradient"])


@pytest.mark.parametrize("rows", [0, 5])
def test_no_gradient_or_no_rows(device: torch.device, rows: int) -> None:
    """Zero upstream gradients, and no rows at all, give zeros."""
    case = Case(device, max(rows, 1), 9, "gathered", coupling_layers=2)
    assert isinstance(case.condition, PositionalRows)
    case.x = case.x.detach()[:rows].requires_grad_()
    assert case.condition.index is not None
    case.condition.index = case.condition.index[:rows]
    lp, log_det, z = case.run("float16")
    assert z is not None
    assert lp.shape == log_det.shape == (rows,)
    assert z.shape == (rows, 9)
    for gradient in case.gradients([lp], [torch.zeros_like(lp)]).values():
        assert (gradient == 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_bits_twice(device: torch.device, precision: MatmulPrecision) -> None:
    case = Case(device, 63, 9, "gathered", coupling_layers=2)
    runs = []
    for _ in range(2):
        got = case.run(precision)
        runs.append([*got, *case.gradients(got, [torch.ones_like(tensor) for tensor in got]).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_has_no_influence(device: torch.device) -> None:
    """Neither around the forward nor around the backward."""
    case = Case(device, 20, 9, "gathered", coupling_layers=2)
    for precision in PRECISIONS:
        plain = case.run(precision)
        expected = torch.autograd.grad(plain[0].sum(), list(case.inputs().values()))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            got = case.run(precision)
            gradients = torch.autograd.grad(got[0].sum(), list(case.inputs().values()))
        assert all(torch.equal(a, b) for a, b in zip([*got, *gradients], [*plain, *expected], strict=True))


def test_half_precision_features_and_weights(device: torch.device) -> None:
    """Narrow tensors are computed in float32; their gradients come back in their own type."""
    case = Case(device, 20, 9, coupling_layers=2)
    weights = [CouplingWeights(*(tensor.detach().bfloat16() for tensor in layer)) for layer in case.weights]
    x = case.x.detach().bfloat16().requires_grad_()
    lp, _, _ = run_wide(x, weights, case.spec, None, False, "float32")
    wide = [CouplingWeights(*(tensor.float() for tensor in layer)) for layer in weights]
    expected, _, _ = run_wide(x.detach().float(), wide, case.spec, None, False, "float32")
    assert lp.dtype == torch.float32
    assert torch.equal(lp, expected)
    assert torch.autograd.grad(lp.sum(), [x])[0].dtype == torch.bfloat16
