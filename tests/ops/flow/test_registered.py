"""The flow's kernels against the oracle in float64: every condition, precision and gradient, on awkward sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.flow_spec import CouplingWeights, FlowSpec
from fastbgad.kernels.tile_sizes import use_tiles
from fastbgad.ops import MatmulPrecision, PositionalRows, flow_forward
from fastbgad.ops.flow.gradient_scale import gradient_scale
from tests.flow_problems import CONDITIONS, GRADIENT_TOLERANCE, LP_TOLERANCE, Problem
from tests.flows import double, lively_flow, whole_error
from tests.grids import grid, slow

pytestmark = pytest.mark.usefixtures("poisoned", "large_tiles")


@grid(precision=["float32", "float16"], kind=CONDITIONS, shape=[(1, 8), (63, 41), (200, 40)])
def test_forward(precision: MatmulPrecision, kind: str, shape: tuple[int, int], device: torch.device) -> None:
    rows, channels = shape
    problem = Problem(kind, rows, channels, device)
    out = problem.run(precision, return_z=True)
    lp, log_det, z = problem.exact()
    assert out.log_likelihood.dtype == torch.float32
    tolerance = LP_TOLERANCE[precision]
    assert whole_error(out.log_likelihood, lp) < tolerance
    # log_det may be near zero; its share in lp is what it is measured by
    assert float((out.log_det.double() - log_det).norm() / channels / lp.norm()) < tolerance
    assert whole_error(out.z, z) < 10 * tolerance
    assert torch.equal(problem.run(precision).log_likelihood, out.log_likelihood)


@pytest.mark.equivalence
@pytest.mark.parametrize(
    ("precision", "rows", "channels"),
    [
        ("float16", 1023, 40),
        slow("float32", 1023, 40),
        ("float16", 63, 72),
        ("float32", 63, 72),
        ("float16", 40, 200),
        slow("float32", 40, 200),
        slow("float16", 33, 256),
        ("float32", 33, 256),
        ("float16", 20, 2),
        ("float32", 20, 2),
    ],
)
def test_forward_of_eight_layers(precision: MatmulPrecision, rows: int, channels: int, device: torch.device) -> None:
    """The depth that ships, at the widths that ship: 72 and 200 channels are staged in memory between layers."""
    problem = Problem("gathered", rows, channels, device, layers=8)
    lp, _, _ = problem.exact()
    assert whole_error(problem.run(precision).log_likelihood, lp) < LP_TOLERANCE[precision]


@pytest.mark.equivalence
@pytest.mark.parametrize(
    ("precision", "channels"), [("float32", 40), slow("float16", 40), slow("float32", 200), ("float16", 200)]
)
def test_maps_of_eight_layers(precision: MatmulPrecision, channels: int, device: torch.device) -> None:
    problem = Problem("raster", 77, channels, device, layers=8)
    lp, _, _ = problem.exact()
    assert whole_error(problem.run(precision).log_likelihood, lp) < LP_TOLERANCE[precision]


@pytest.mark.parametrize(("height", "width", "maps"), [(1, 1, 3), (1, 9, 1), (9, 1, 2), (8, 8, 1), (9, 17, 2)])
def test_maps_of_any_shape(height: int, width: int, maps: int, device: torch.device) -> None:
    """Tiles of pixels that hang over every edge."""
    spec = FlowSpec(9, 128, 2)
    flow = lively_flow(spec, gain=1.0).to(device)
    positions = PositionalRows(height, width)
    x = torch.randn(maps * height * width, 9, device=device)
    flow.requires_grad_(False)
    out = flow_forward(x, flow.weights(), spec, positions, impl="triton", matmul_precision="float32")
    dense = positions.dense(len(x), torch.float64, device)
    z, log_det = reference.flow_forward(x.double(), double(flow.weights()), spec, dense)
    assert whole_error(out.log_likelihood, reference.log_likelihood(z, log_det)) < LP_TOLERANCE["float32"]


@pytest.mark.parametrize("channels", [24, 40, 72, 200])
def test_tiles_that_ship(channels: int, device: torch.device) -> None:
    """The other tests take larger ones where kernels are interpreted."""
    use_tiles(None)
    problem = Problem("raster", 77, channels, device)
    assert whole_error(problem.run().log_likelihood, problem.exact()[0]) < LP_TOLERANCE["float16"]
    problem = Problem("gathered", 20, channels, device)
    upstream = torch.rand(20, device=device)
    got, exact = problem.gradients("float16", upstream), problem.exact_gradients("float16", upstream)
    for name, value in got.items():
        assert whole_error(value, exact[name]) < GRADIENT_TOLERANCE["float16"], name


@pytest.mark.equivalence
@pytest.mark.parametrize(
    ("precision", "kind", "rows", "channels"),
    [
        ("float16", "none", 63, 41),
        ("float32", "none", 63, 41),
        ("float16", "raster", 77, 8),
        slow("float32", "raster", 77, 8),
        ("float16", "gathered", 1023, 40),
        slow("float32", "gathered", 1023, 40),
        slow("float16", "positions", 63, 41),
        ("float32", "positions", 63, 41),
        slow("float16", "positions", 1, 40),
        ("float32", "positions", 1, 40),
        ("float16", "dense", 63, 41),
        slow("float32", "dense", 63, 41),
        ("float16", "positions", 40, 72),
        ("float32", "positions", 40, 72),
        ("float16", "positions", 33, 200),
        ("float32", "positions", 33, 200),
    ],
)
def test_gradients(precision: MatmulPrecision, kind: str, rows: int, channels: int, device: torch.device) -> None:
    """Of every weight and of x, from gradients of lp, log_det and z at once."""
    problem = Problem(kind, rows, channels, device)
    count = len(problem.exact_x)
    upstream = [torch.randn(count, device=device) / count, torch.randn(count, device=device) / count / channels,
                torch.randn(count, channels, device=device) / count / channels]  # fmt: skip
    got, exact = problem.gradients(precision, *upstream), problem.exact_gradients(precision, *upstream)
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert whole_error(value, exact[name]) < GRADIENT_TOLERANCE[precision], name


@pytest.mark.equivalence
@pytest.mark.parametrize(("channels", "layers"), [(40, 8), (72, 3), slow(200, 8)])
def test_gradients_of_many_layers(channels: int, layers: int, device: torch.device) -> None:
    """From lp alone, as in training; wide rows are staged in memory between a first, an inner and a last layer."""
    problem = Problem("positions", 48, channels, device, layers=layers)
    upstream = torch.rand(48, device=device) / 48
    got, exact = problem.gradients("float16", upstream), problem.exact_gradients("float16", upstream)
    for name, value in got.items():
        assert whole_error(value, exact[name]) < GRADIENT_TOLERANCE["float16"], name


@pytest.mark.parametrize("magnitude", [1e-12, 1e6])
def test_gradients_of_any_magnitude(magnitude: float, device: torch.device) -> None:
    """A mean over a million rows and a loss scaled by an AMP scaler both stay inside the range of float16."""
    problem = Problem("positions", 63, 24, device)
    upstream = magnitude * torch.randn(63, device=device)
    got, exact = problem.gradients("float16", upstream), problem.exact_gradients("float16", upstream)
    for name, value in got.items():
        assert whole_error(value, exact[name]) < GRADIENT_TOLERANCE["float16"], name


def test_gradient_scale() -> None:
    """An exact power of two for whatever comes; of the wide flow, too."""
    nothing = torch.zeros(0)
    assert gradient_scale(nothing, None).tolist() == [1]
    assert gradient_scale(torch.zeros(3), nothing).tolist() == [1]
    assert gradient_scale(None, torch.tensor([1e-3, -3.0]), torch.zeros(2, 2)).tolist() == [0.25]
    for bad in (float("nan"), float("inf")):
        assert gradient_scale(torch.tensor([2.0]), torch.tensor([bad, 3.0])).tolist() == [1]
    for value in (2.0**-119, 1e-30, 7e-5, 0.5, 1 - 2.0**-24, 1.0, 1 + 2.0**-23, 9e20, 2.0**119):
        scale = float(gradient_scale(torch.tensor([value, 0.0])))
        assert math.frexp(scale)[0] == 0.5
        assert 0.5 <= value * scale < 1
    # Beyond, the scale and its inverse stay normal numbers.
    for value in (1e-45, 3e38):
        scale = gradient_scale(torch.tensor([value]))
        assert 2.0**-120 <= float(scale) <= 2.0**120
        assert float(1 / scale) == 1 / float(scale)


@grid(form=["tanh", "scaled_tanh"], affine=["SOFTPLUS", "SIGMOID", "EXP"], hard=[False, True])
def test_variants(form: str, affine: str, hard: bool, device: torch.device) -> None:
    problem = Problem(
        "positions", 40, 9, device, layers=3, clamp=1.3, clamp_form=form, global_affine=affine, hard_permutation=hard
    )
    out, (lp, _, z) = problem.run("float32", return_z=True), problem.exact()
    assert whole_error(out.log_likelihood, lp) < LP_TOLERANCE["float32"]
    assert whole_error(out.z, z) < LP_TOLERANCE["float32"]
    upstream = torch.randn(40, device=device), torch.randn(40, device=device), torch.randn(40, 9, device=device)
    got, exact = problem.gradients("float32", *upstream), problem.exact_gradients("float32", *upstream)
    for name, value in got.items():
        assert whole_error(value, exact[name]) < GRADIENT_TOLERANCE["float32"], name


@pytest.mark.parametrize("channels", [41, 72])
def test_hard_permutation_in_half_precision(channels: int, device: torch.device) -> None:
    """Moving channels loses nothing: the state stays float32."""
    problem = Problem("gathered", 63, channels, device, hard_permutation=True)
    assert whole_error(problem.run(return_z=True).log_likelihood, problem.exact()[0]) < LP_TOLERANCE["float16"]


@pytest.mark.parametrize(
    ("kind", "layers"),
    [(kind, 2) if kind == "gathered" else (kind, 1) for kind in CONDITIONS]
    + [slow(kind, 2) for kind in CONDITIONS if kind != "gathered"],
)
def test_recomputing_gives_the_same_gradients(
    kind: str, layers: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of rows that the backward carries forward again: every kind of rows can be cut."""
    monkeypatch.setattr("fastbgad.ops.flow.registered.RECOMPUTE_ROWS", 64)
    problem = Problem(kind, 100, 9, device, layers=layers)
    upstream = torch.randn(len(problem.exact_x), device=device)
    kept = problem.gradients("float32", upstream, recompute=False)
    again = problem.gradients("float32", upstream, recompute=True)
    for name, value in again.items():
        assert whole_error(value, kept[name]) < 1e-6, name


def test_same_input_same_bits(device: torch.device) -> None:
    problem = Problem("gathered", 150, 41, device)
    upstream = torch.randn(150, device=device)
    first, second = (problem.gradients("float16", upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_features_of_any_type_and_stride(device: torch.device) -> None:
    problem = Problem("raster", 77, 24, device)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = problem.x.to(dtype)
        problem.x = rounded.float()
        expected = problem.run("float32").log_likelihood
        problem.x = rounded
        assert torch.equal(problem.run("float32").log_likelihood, expected)
    wide = torch.randn(77, 100, device=device)
    problem.x = wide[:, 10:34].contiguous()
    expected = problem.run("float32").log_likelihood
    for strided in (wide[:, 10:34], problem.x.T.contiguous().T):
        problem.x = strided
        assert torch.equal(problem.run("float32").log_likelihood, expected)


def test_no_rows(device: torch.device) -> None:
    problem = Problem("positions", 0, 8, device)
    assert problem.run().log_likelihood.shape == (0,)
    got = problem.gradients("float16", torch.zeros(0, device=device))
    assert all((value == 0).all() for value in got.values())


def test_only_what_needs_a_gradient(device: torch.device) -> None:
    """Frozen weights, mixed with trained ones: the trained ones' gradients do not change."""
    problem = Problem("positions", 30, 9, device)
    upstream = torch.randn(30, device=device)
    expected = problem.gradients("float32", upstream)
    layers = [CouplingWeights(*(t.detach().clone() for t in w)) for w in problem.flow.weights()]
    layers[1].w2.requires_grad_()
    out = flow_forward(problem.x, layers, problem.spec, problem.condition, impl="triton", matmul_precision="float32")
    out.log_likelihood.backward(upstream)
    assert torch.equal(layers[1].w2.grad, expected["w2"][1])
    assert layers[0].w2.grad is None


def test_gradcheck(device: torch.device) -> None:
    """Against finite differences, independent of the oracle; float32, so with wide steps and tolerances."""
    spec = FlowSpec(6, condition_channels=4, coupling_layers=2)
    flow = lively_flow(spec, gain=1.0).to(device)
    positions = PositionalRows(3, 4, torch.tensor([0, 11, 5, 5, 2, 7], device=device), channels=4)
    shapes = [p.shape for layer in flow.weights() for p in layer[:-1]]
    rotations = [layer.w_perm for layer in flow.weights()]

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        layers = [CouplingWeights(*tensors[6 * i : 6 * i + 6], rotations[i]) for i in range(2)]
        return tuple(flow_forward(x, layers, spec, positions, return_z=True, impl="triton", matmul_precision="float32"))

    x = torch.randn(6, 6, device=device, requires_grad=True)
    leaves = [p.detach().clone().requires_grad_() for layer in flow.weights() for p in layer[:-1]]
    assert [leaf.shape for leaf in leaves] == shapes
    assert torch.autograd.gradcheck(run, (x, *leaves), eps=3e-3, atol=3e-2, rtol=3e-2, fast_mode=True)


def test_saved_activations_are_small() -> None:
    """At 4096 rows, in bytes, without computing anything: below 70 MB at C = 200, 9 MB at C = 40."""
    from torch._subclasses import FakeTensorMode

    for channels, limit in ((200, 70e6), (72, 20e6), (40, 9e6)):
        spec = FlowSpec(channels)
        with FakeTensorMode():
            weights = [torch.empty(1) for _ in range(7 * spec.coupling_layers)]
            results = torch.ops.fastbgad.flow_train(
                torch.empty(4096, channels), weights, [torch.empty(1, dtype=torch.float16)], None, False, None, 64, 64,
                128, spec.hidden_channels, 1.9, False, False, False,
            )  # fmt: skip
        assert sum(t.numel() * t.element_size() for t in results) < limit
