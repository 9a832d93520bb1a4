"""The portable fast path of the flow against the oracle in float64, forward and every gradient, on awkward sizes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.errors import ConfigError, FeatureError
from fastbgad.flow_spec import FlowSpec
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import Geometry, PositionalRows, flow_forward, flow_inverse
from tests.flows import budget, double, lively_flow, relative_error

DTYPES = [torch.float32, torch.float64]


pytestmark = pytest.mark.usefixtures("poisoned")


def condition_of(kind: str, rows: int, channels: int) -> tuple[PositionalRows | Tensor | None, int]:
    """A condition for `rows` rows, and the number of channels the flow must take."""
    if kind == "none":
        return None, 0
    if kind == "dense":
        return torch.randn(rows, channels), channels
    if kind == "gathered":
        return PositionalRows(11, 7, torch.randint(0, 77, (rows,)), channels=channels), channels
    return PositionalRows(1, rows, channels=channels), channels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "dense", "gathered", "raster"])
@pytest.mark.parametrize(("rows", "channels"), [(1, 8), (63, 41), (1023, 9), (130, 2)])
def test_forward_and_gradients(dtype: torch.dtype, kind: str, rows: int, channels: int) -> None:
    torch.manual_seed(rows + channels)
    condition, p = condition_of(kind, rows, 16)
    spec = FlowSpec(channels, condition_channels=p, coupling_layers=4)
    flow = lively_flow(spec, dtype=dtype)
    x = torch.randn(rows, channels, dtype=dtype, requires_grad=True)
    if isinstance(condition, Tensor):
        condition = condition.to(dtype).requires_grad_()
    out = flow_forward(x, flow.weights(), spec, condition, return_z=True, impl="torch", chunk_rows=50)
    upstream = [torch.randn_like(t) for t in (out.log_likelihood, out.log_det, out.z)]
    leaves = [parameter for parameter in flow.parameters() if parameter.requires_grad]
    names = [name for name, parameter in flow.named_parameters() if parameter.requires_grad]
    inputs = [x, *leaves, *([condition] if isinstance(condition, Tensor) else [])]
    got = torch.autograd.grad([out.log_likelihood, out.log_det, out.z], inputs, upstream)

    exact_layers = double(flow.weights())
    exact_x = x.detach().double().requires_grad_()
    dense = None
    if isinstance(condition, PositionalRows):
        dense = condition.dense(rows, torch.float64, x.device)
    elif condition is not None:
        dense = condition.detach().double().requires_grad_()
    z, log_det = reference.flow_forward(exact_x, exact_layers, spec, dense)
    lp = reference.log_likelihood(z, log_det)
    exact_inputs = [exact_x]
    for layer in exact_layers:  # in the order of named_parameters: scale and offset first
        exact_inputs += [layer.global_scale, layer.global_offset, layer.w1, layer.b1, layer.w2, layer.b2]
    if isinstance(condition, Tensor):
        exact_inputs.append(dense)
    exact = torch.autograd.grad([lp, log_det, z], exact_inputs, [t.double() for t in upstream])

    # Four layers of three products each, forward and back; sums over rows add sqrt(rows).
    tolerance = budget(dtype, 24 * max(rows, 16))
    for name, value, truth in [("lp", out.log_likelihood, lp), ("log_det", out.log_det, log_det), ("z", out.z, z)]:
        assert relative_error(value, truth) < tolerance, name
    for name, value, truth in zip(["x", *names, "condition"], got, exact, strict=False):
        assert value.dtype == dtype
        assert relative_error(value.reshape(truth.shape), truth) < tolerance, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("maps", "height", "width", "chunk_rows"),
    [(1, 1, 1, 8), (3, 4, 5, 7), (3, 4, 5, 20), (3, 4, 5, 47), (2, 9, 13, 1000), (1, 33, 31, 100), (2, 5, 60, 8)],
)
def test_inference_in_chunks(dtype: torch.dtype, maps: int, height: int, width: int, chunk_rows: int) -> None:
    """Raster order in every relation of chunk, image row and map; the result does not depend on the chunk."""
    spec = FlowSpec(11, condition_channels=128, coupling_layers=3)
    flow = lively_flow(spec, dtype=dtype)
    rows = maps * height * width
    x = torch.randn(rows, 11, dtype=dtype)
    positions = PositionalRows(height, width)
    with torch.no_grad():
        out = flow_forward(x, flow.weights(), spec, positions, return_z=True, impl="torch", chunk_rows=chunk_rows)
    z, log_det = reference.flow_forward(
        x.double(), double(flow.weights()), spec, positions.dense(rows, torch.float64, x.device)
    )
    tolerance = budget(dtype, 9 * 128)
    assert relative_error(out.z, z) < tolerance
    assert relative_error(out.log_det, log_det) < tolerance
    assert relative_error(out.log_likelihood, reference.log_likelihood(z, log_det)) < tolerance


@pytest.mark.parametrize("form", ["tanh", "scaled_tanh"])
@pytest.mark.parametrize("affine", ["SOFTPLUS", "SIGMOID", "EXP"])
@pytest.mark.parametrize("hard", [False, True])
def test_variants(form: str, affine: str, hard: bool) -> None:
    spec = FlowSpec(9, 8, 3, clamp=1.3, clamp_form=form, global_affine=affine, hard_permutation=hard)
    flow = lively_flow(spec, dtype=torch.float64)
    x = torch.randn(40, 9, dtype=torch.float64)
    p = torch.randn(40, 8, dtype=torch.float64)
    weights = [parameter for parameter in flow.parameters() if parameter.requires_grad]
    results = []
    for impl in ("torch", "reference"):
        lp = flow(x, p, impl=impl).log_likelihood
        results.append([lp, *torch.autograd.grad(lp.sum(), weights)])
    for fast, exact in zip(*results, strict=True):
        assert relative_error(fast, exact) < 1e-12


def test_gradcheck() -> None:
    """Against finite differences, independent of the oracle."""
    spec = FlowSpec(5, condition_channels=4, coupling_layers=2)
    flow = lively_flow(spec, dtype=torch.float64)
    positions = PositionalRows(3, 4, torch.tensor([0, 11, 5, 5, 2, 7]), channels=4)

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        names = [name for name, parameter in flow.named_parameters() if parameter.requires_grad]
        return torch.func.functional_call(
            flow, dict(zip(names, parameters, strict=True)), (x, positions), {"return_z": True}
        )

    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    leaves = [p.detach().clone().requires_grad_() for p in flow.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(run, (x, *leaves), fast_mode=True)


def test_same_seed_same_bits() -> None:
    spec = FlowSpec(9, coupling_layers=2)
    x, index = torch.randn(500, 9), torch.randint(0, 64, (500,))
    runs = []
    for _ in range(2):
        flow = ConditionalFlow(spec, seed=5)
        lp = flow(x, PositionalRows(8, 8, index)).log_likelihood
        lp.sum().backward()
        runs.append([lp, *(p.grad for p in flow.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_construction_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    a, b, c = (ConditionalFlow(FlowSpec(8), seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.module_list[0].w_perm, c.module_list[0].w_perm)
    w = a.module_list[0].w_perm.double()
    assert torch.allclose(w @ w.T, torch.eye(8, dtype=torch.float64), atol=1e-6)
    assert torch.linalg.det(w) > 0


def test_inverse_undoes_forward() -> None:
    spec = FlowSpec(9, coupling_layers=4)
    flow = lively_flow(spec, dtype=torch.float64)
    with torch.no_grad():  # exactly orthogonal
        for layer in flow.module_list:
            layer.w_perm.copy_(torch.linalg.qr(layer.w_perm)[0])
    x, positions = torch.randn(12, 9, dtype=torch.float64), PositionalRows(3, 4)
    out = flow(x, positions, return_z=True)
    back, log_det = flow_inverse(out.z, flow.weights(), spec, positions)
    assert relative_error(back, x) < 1e-11
    assert relative_error(log_det, -out.log_det) < 1e-11


def test_half_precision_input_and_autocast() -> None:
    """Narrow input is computed in float32, inside autocast too."""
    spec = FlowSpec(8, coupling_layers=2)
    flow = lively_flow(spec)
    x = torch.randn(12, 8)
    positions = PositionalRows(3, 4)
    expected = flow(x.bfloat16().float(), positions).log_likelihood
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = flow(x.bfloat16(), positions).log_likelihood
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_no_rows() -> None:
    spec = FlowSpec(8, coupling_layers=2)
    flow = ConditionalFlow(spec)
    empty = PositionalRows(4, 4, torch.zeros(0, dtype=torch.int64))
    lp = flow(torch.zeros(0, 8), empty).log_likelihood
    assert lp.shape == (0,)
    lp.sum().backward()
    assert all((p.grad == 0).all() for p in flow.parameters() if p.requires_grad)


def test_inference_holds_one_chunk() -> None:
    """The largest tensor allocated is a chunk's, not the whole input's hidden activations."""
    spec = FlowSpec(8, coupling_layers=2)
    flow = ConditionalFlow(spec)
    x = torch.randn(64 * 64 * 4, 8)
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        flow_forward(x, flow.weights(), spec, PositionalRows(64, 64), impl="torch", chunk_rows=256)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 2 * 256 * spec.hidden_channels * 4


@pytest.mark.parametrize(
    ("x", "condition", "message"),
    [
        (torch.zeros(4, 7), PositionalRows(2, 2), r"\[N, 8\]"),
        (torch.zeros(5, 8), PositionalRows(2, 2), "whole number"),
        (torch.zeros(5, 8), PositionalRows(2, 2, torch.zeros(4, dtype=torch.int64)), "5 feature rows but 4"),
        (torch.zeros(4, 8), None, "condition of 128"),
        (torch.zeros(4, 8), torch.zeros(3, 128), r"must be \[4, P\]"),
        (torch.zeros(4, 8, dtype=torch.int32), PositionalRows(2, 2), "floating point"),
    ],
)
def test_bad_input(x: Tensor, condition: PositionalRows | Tensor | None, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        ConditionalFlow(FlowSpec(8, coupling_layers=1))(x, condition)


def test_explicit_impl_never_falls_back() -> None:
    """On a CPU, without the interpreter that the tests of the kernels use."""
    script = """
import torch, fastbgad
from fastbgad.ops import boundary, score_map, spp_loss
flow, rows, mask = fastbgad.ConditionalFlow(fastbgad.FlowSpec(8)), torch.zeros(4, 8), torch.zeros(4, dtype=torch.bool)
for call in (
    lambda: flow(rows, fastbgad.PositionalRows(2, 2), impl="triton"),
    lambda: boundary(rows[:, 0], mask, impl="triton"),
    lambda: spp_loss(rows[:, 0], mask, 8, impl="triton"),
    lambda: score_map([rows.view(1, 4, 8)], (8, 8), torch.zeros(1), 0.0, impl="triton"),
):
    try:
        call()
    except fastbgad.FastBGADError as error:
        print(type(error).__name__, error)
flow(rows, fastbgad.PositionalRows(2, 2))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("BackendError") and "the kernels run on CUDA tensors" in line for line in lines)
    with pytest.raises(ConfigError, match="choose one of"):
        ConditionalFlow(FlowSpec(8))(torch.zeros(4, 8), PositionalRows(2, 2), impl="fast")


@pytest.mark.parametrize(
    "bad", [{"channels": 1}, {"clamp": 0.0}, {"condition_channels": 3}, {"coupling_layers": 0}, {"clamp_form": "x"}]
)
def test_bad_spec(bad: dict) -> None:
    with pytest.raises(ConfigError):
        FlowSpec(**{"channels": 8, **bad})


def test_torch_compile_changes_nothing() -> None:
    """A flow inside a compiled model gives the same values and gradients (eager backend: no compiler needed).

    "auto" would take compiled C++ outside of it, which cannot be traced; see test_compiled.py.
    """
    spec = FlowSpec(8, coupling_layers=2)
    flow = lively_flow(spec)
    flow.impl = "torch"
    positions, x = PositionalRows(3, 4), torch.randn(12, 8)
    compiled = torch.compile(flow, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, positions).log_likelihood, flow(x, positions).log_likelihood)
    gradients = []
    for run in (compiled, flow):
        flow.zero_grad()
        run(x, positions).log_likelihood.sum().backward()
        gradients.append([p.grad.clone() for p in flow.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_former_name_of_the_matmul_precision() -> None:
    """It warns, at the caller's line, and means the same; the default is what float16 was."""
    spec = FlowSpec(9, condition_channels=0, coupling_layers=2)
    flow, x = lively_flow(spec), torch.randn(40, 9, requires_grad=True)

    def lp(**options: str) -> Tensor:
        return flow_forward(x, flow.weights(), spec, impl="torch", **options).log_likelihood

    for name in ("float16", "float32", "bfloat16"):
        with pytest.warns(DeprecationWarning, match="now called matmul_precision") as warned:
            found = lp(precision=name)
        assert warned[0].filename == __file__
        assert torch.equal(found, lp(matmul_precision=name))
    assert torch.equal(lp(), lp(matmul_precision="float16"))
    with pytest.warns(DeprecationWarning, match="now called matmul_precision"):
        old = ConditionalFlow(spec, precision="float32")
    assert old.matmul_precision == "float32"
    with pytest.warns(DeprecationWarning, match="now called matmul_precision"):
        assert old.precision == "float32"
    with pytest.warns(DeprecationWarning, match="now called matmul_precision"):
        old.precision = "bfloat16"
    assert old.matmul_precision == "bfloat16"
    assert Geometry.of(None, "auto") == Geometry.of(None, "float16")
