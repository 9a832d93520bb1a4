"""The flow in compiled C++ against the oracle in float64, forward and every gradient, on awkward sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.errors import BackendError, ConfigError, FeatureError
from fastbgad.flow_spec import FlowSpec
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import FlowOutput, Impl, PositionalRows, boundary, flow_forward, log_likelihood, score_map, spp_loss
from fastbgad.ops.flow import compiled
from fastbgad.ops.native import build as native_build
from tests.flows import budget, double, lively_flow, relative_error, whole_error

FIELDS = ("global_scale", "global_offset", "w1", "b1", "w2", "b2")


@pytest.fixture(autouse=True)
def _compiled(poisoned: None) -> None:
    obstacle = native_build.why_not_native()
    if obstacle is not None:
        pytest.skip(obstacle)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def positions_of(kind: str, rows: int, channels: int) -> PositionalRows | None:
    if kind == "none":
        return None
    if kind == "raster":
        return PositionalRows(1, rows, channels=channels)
    return PositionalRows(11, 7, torch.randint(0, 77, (rows,)), channels=channels)


def exact_outputs(
    flow: ConditionalFlow, x: Tensor, positions: PositionalRows | None
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """lp, log_det and z of the oracle in float64, and its leaves: x, then those of every layer in the flow's order."""
    layers, x = double(flow.weights()), x.detach().double().requires_grad_()
    dense = None if positions is None else positions.dense(len(x), torch.float64, x.device)
    z, log_det = reference.flow_forward(x, layers, flow.spec, dense)
    return (reference.log_likelihood(z, log_det), log_det, z), [x, *(getattr(l, f) for l in layers for f in FIELDS)]


def check(flow: ConditionalFlow, x: Tensor, positions: PositionalRows | None, used: tuple[bool, bool, bool]) -> None:
    """Values, and gradients of the outputs that are used; inference too."""
    x = x.requires_grad_()
    found = flow_forward(x, flow.weights(), flow.spec, positions, return_z=True, impl="native")
    exact, leaves = exact_outputs(flow, x, positions)
    # Some ten chained products forward; four layers of three products forth and back, and sums over rows.
    tolerance = budget(torch.float32, 24 * max(len(x), 16))
    for value, truth in zip(found, exact, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, truth) < tolerance
    upstream = [torch.randn_like(value) for value in found]
    got = torch.autograd.grad(
        [value for value, use in zip(found, used, strict=True) if use],
        [x, *(p for p in flow.parameters() if p.requires_grad)],
        [d for d, use in zip(upstream, used, strict=True) if use],
    )
    expected = torch.autograd.grad(
        [value for value, use in zip(exact, used, strict=True) if use],
        leaves,
        [d.double() for d, use in zip(upstream, used, strict=True) if use],
        materialize_grads=True,
    )
    for value, truth in zip(got, expected, strict=True):
        assert relative_error(value.reshape(truth.shape), truth) < tolerance
    with torch.no_grad():
        inferred = flow_forward(x, flow.weights(), flow.spec, positions, return_z=True, impl="native")
    assert all(torch.equal(a, b) for a, b in zip(inferred, found, strict=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["none", "gathered", "raster"])
@pytest.mark.parametrize(("rows", "channels"), [(1, 8), (31, 3), (63, 41), (64, 24), (65, 33), (1023, 9), (130, 2)])
def test_forward_and_gradients(kind: str, rows: int, channels: int) -> None:
    torch.manual_seed(rows + channels)
    positions = positions_of(kind, rows, 20)
    flow = lively_flow(FlowSpec(channels, 20 if positions else 0, coupling_layers=4))
    check(flow, torch.randn(rows, channels), positions, (True, True, True))


@pytest.mark.usefixtures("threads")
def test_many_rows() -> None:
    """Several chunks of tiles per thread."""
    torch.manual_seed(0)
    flow = lively_flow(FlowSpec(32, 128, coupling_layers=2))
    check(flow, torch.randn(4099, 32), PositionalRows(64, 48, torch.randint(0, 64 * 48, (4099,))), (True, True, True))


@pytest.mark.parametrize("used", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_of_one_output(used: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(1)
    check(lively_flow(FlowSpec(10, 8, 3)), torch.randn(100, 10), PositionalRows(10, 5, channels=8), used)


@pytest.mark.parametrize("form", ["tanh", "scaled_tanh"])
@pytest.mark.parametrize("affine", ["SOFTPLUS", "SIGMOID", "EXP"])
@pytest.mark.parametrize("hard", [False, True])
def test_variants(form: str, affine: str, hard: bool) -> None:
    torch.manual_seed(2)
    spec = FlowSpec(9, 8, 3, clamp=1.3, clamp_form=form, global_affine=affine, hard_permutation=hard)
    check(lively_flow(spec), torch.randn(70, 9), PositionalRows(7, 5, channels=8), (True, True, True))


def test_scales_far_from_one() -> None:
    """The exponential over its range: exp(s) overflows to Inf and vanishes just where PyTorch's does."""
    spec = FlowSpec(6, 0, 1, clamp=120.0)
    flow, x = lively_flow(spec, gain=12.0), torch.randn(4000, 6)
    with torch.no_grad():
        z, expected = (flow(x, impl=impl, return_z=True).z for impl in ("native", "torch"))
        assert z is not None
        assert expected is not None
        layer = flow.weights()[0]
        active = (x[:, :3] @ layer.w1.T + layer.b1).relu() @ layer.w2.T + layer.b2
    assert active[:, :3].max() > 20  # tanh is 1
    assert active[:, :3].min() < -20
    assert not z.isfinite().all()
    assert torch.equal(z.isnan(), expected.isnan())
    both = (z.abs() < 1e30) & (expected.abs() < 1e30)
    assert both.sum() > 1000
    # an error of 1e-7 in tanh(a) is one of 1e-5 in s and in exp(s)
    assert ((z - expected)[both].abs() <= 1e-4 * expected[both].abs() + 1e-4).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    flow = ConditionalFlow(FlowSpec(8, coupling_layers=2), impl="native")
    positions = PositionalRows(4, 4, torch.zeros(rows, dtype=torch.int64))
    x = torch.zeros(rows, 8, requires_grad=True)
    out = flow(x, positions, return_z=True)
    assert out.log_likelihood.shape == (rows,)
    assert out.z.shape == (rows, 8)
    out.log_likelihood.sum().backward()
    assert x.grad.shape == (rows, 8)
    if not rows:
        assert all((p.grad == 0).all() for p in flow.parameters() if p.requires_grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_lost_row_touches_no_other(bad: float) -> None:
    torch.manual_seed(3)
    flow, positions = lively_flow(FlowSpec(9, 8, 3)), PositionalRows(10, 7, channels=8)
    x = torch.randn(70, 9)
    with torch.no_grad():
        clean = flow(x, positions, return_z=True, impl="native")
        x[65, 2] = x[3, 8] = bad
        found = flow(x, positions, return_z=True, impl="native")
    kept = torch.ones(70, dtype=torch.bool)
    kept[[3, 65]] = False
    for value, before in zip(found, clean, strict=True):
        assert torch.equal(value[kept], before[kept])
    assert not found.log_likelihood[~kept].isfinite().any()
    gradients = []
    for impl in ("native", "torch"):
        lp = flow(x, positions, impl=impl).log_likelihood
        gradients.append(torch.autograd.grad(lp[kept].sum(), [p for p in flow.parameters() if p.requires_grad]))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_same_threads_same_bits(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without the OpenMP runtime that PyTorch has loaded."""
    torch.manual_seed(4)
    x, positions = torch.randn(1000, 9), PositionalRows(8, 8, torch.randint(0, 64, (1000,)))
    runs = []
    for attempt in range(3):
        if attempt == 2:
            monkeypatch.setattr(compiled, "openmp_parallel", lambda: None)
        flow = ConditionalFlow(FlowSpec(9, coupling_layers=2), seed=5, impl="native")
        lp = flow(x, positions).log_likelihood
        lp.sum().backward()
        runs.append([lp, *(p.grad for p in flow.parameters() if p.requires_grad)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("channels", [0, 8])
def test_selected_rows(dtype: torch.dtype, channels: int) -> None:
    torch.manual_seed(5)
    flow = lively_flow(FlowSpec(9, channels, 3))
    positions = PositionalRows(10, 7, channels=channels) if channels else None
    x, rows = torch.randn(210, 9), torch.randperm(210)[:100].to(dtype)
    index = PositionalRows(10, 7, rows.long() % 70, channels=channels) if channels else None
    results = []
    for found in (
        flow(x, positions, rows=rows, impl="native"),
        flow(x.double().half().float(), positions, rows=rows, impl="native"),
        flow(x.half(), positions, rows=rows, impl="native"),
        flow(x[rows.long()], index, impl="native"),
        flow(x[rows.long()].t().contiguous().t(), index, impl="native"),
        flow(x.clone().requires_grad_(), positions, rows=rows, impl="native"),
    ):
        leaves = [p for p in flow.parameters() if p.requires_grad]
        results.append([found.log_likelihood, *torch.autograd.grad(found.log_likelihood.sum(), leaves)])
    for same in (results[3], results[4], results[5]):
        assert all(torch.equal(a, b) for a, b in zip(results[0], same, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))


def gradient(loss: Tensor, flow: torch.nn.Module, **options: bool) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in flow.parameters() if p.requires_grad], **options))


def test_graphs_live_side_by_side() -> None:
    """Two graphs at a time, one of them used twice; inference in between, and an index that is written over."""
    flow, index = lively_flow(FlowSpec(9, 16, 3)), torch.randint(0, 512, (512,))
    positions = PositionalRows(16, 32, index, channels=16)
    first, second = torch.randn(2, 512, 9)

    def loss(x: Tensor) -> Tensor:
        return flow(x, positions, impl="native").log_likelihood.sum()

    alone = [gradient(loss(x), flow) for x in (first, second)]
    kept = loss(first)
    once = gradient(kept, flow, retain_graph=True)
    with torch.inference_mode():
        loss(second)
    other = gradient(loss(second), flow)
    index.fill_(10**6)
    twice = gradient(kept, flow)
    for got, expected in ((once, alone[0]), (other, alone[1]), (twice, alone[0])):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_weights_changed_before_the_backward() -> None:
    flow = lively_flow(FlowSpec(9, 16, 2))
    loss = flow(torch.randn(8, 9), PositionalRows(2, 4, channels=16), impl="native").log_likelihood.sum()
    with torch.no_grad():
        flow.module_list[0].global_scale += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_places_outside_of_the_map() -> None:
    flow = ConditionalFlow(FlowSpec(8, coupling_layers=1), impl="native")
    for place in (-1, 12):
        with pytest.raises(FeatureError, match="outside of the 3 x 4 map"):
            flow(torch.zeros(2, 8), PositionalRows(3, 4, torch.tensor([0, place])))


def test_frozen_flow_keeps_its_weights() -> None:
    flow = lively_flow(FlowSpec(9, 16, 3)).requires_grad_(False)
    x, positions = torch.randn(300, 9), PositionalRows(15, 20, channels=16)
    expected = flow(x, positions, impl="native").log_likelihood
    flow.freeze()
    for impl in ("native", "auto"):
        assert torch.equal(flow(x, positions, impl=impl).log_likelihood, expected)
    assert flow._prepared is not None
    (kept,) = flow._prepared.values()
    assert isinstance(kept, compiled.CompiledWeights)
    with torch.no_grad():
        flow.module_list[0].global_scale += 1
    changed = flow(x, positions, impl="native").log_likelihood
    assert not torch.equal(changed, expected)
    other = PositionalRows(20, 15, channels=16)
    for place, found in ((positions, changed), (other, flow(x, other, impl="native").log_likelihood)):
        exact = flow(x.double(), place, impl="reference").log_likelihood
        assert relative_error(found, exact) < budget(torch.float32, 9)


def test_who_serves_a_call() -> None:
    """Explicit calls raise with the reason, "auto" goes to PyTorch's operations."""

    def call(
        flow: ConditionalFlow,
        x: Tensor,
        condition: PositionalRows | Tensor | None,
        impl: str,
        precision: str = "float32",
    ) -> FlowOutput:
        return flow_forward(x, flow.weights(), flow.spec, condition, impl=impl, matmul_precision=precision)

    narrow, wide = lively_flow(FlowSpec(8, 16, 2)), ConditionalFlow(FlowSpec(400, 16, 1))
    x, positions = torch.randn(12, 8), PositionalRows(3, 4, channels=16)
    for flow, features, condition, reason in (
        (narrow, x.double(), positions, "float64"),
        (narrow, x, torch.randn(12, 16), "this one is dense"),
        (wide, torch.randn(12, 400), positions, "this flow has 400"),
    ):
        with pytest.raises(BackendError, match=reason):
            call(flow, features, condition, "native")
        auto, portable = (call(flow, features, condition, impl).log_likelihood for impl in ("auto", "torch"))
        assert torch.equal(auto, portable)
    with pytest.raises(ConfigError, match="bfloat16"):
        call(narrow, x, positions, "native", "bfloat16")
    rounded = [call(narrow, x, positions, impl, "bfloat16").log_likelihood for impl in ("auto", "torch")]
    assert torch.equal(*rounded)
    auto, native, portable = (call(narrow, x, positions, impl).log_likelihood for impl in ("auto", "native", "torch"))
    assert torch.equal(auto, native)
    assert whole_error(auto, portable) < 1e-5


def test_other_operations_take_the_portable_path() -> None:
    torch.manual_seed(6)
    z, lp, anomalous = torch.randn(40, 8), torch.randn(40), torch.rand(40) < 0.2
    calls: list[Callable[[Impl], Any]] = [
        lambda impl: log_likelihood(z, lp, impl=impl),
        lambda impl: boundary(lp, anomalous, impl=impl),
        lambda impl: spp_loss(lp, anomalous, 8, impl=impl),
        lambda impl: score_map([lp.view(1, 5, 8)], (10, 16), torch.zeros(1), 0.0, impl=impl),
    ]
    for call in calls:
        native, portable = (call(impl) for impl in ("native", "torch"))
        for a, b in zip(native, portable, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_traced_calls_take_what_can_be_traced() -> None:
    flow, positions = lively_flow(FlowSpec(8, 16, 2)).requires_grad_(False), PositionalRows(3, 4, channels=16)
    x, other = torch.randn(2, 12, 8)
    program = torch.export.export(Likelihood(flow, positions), (x,))
    assert whole_error(program.module()(other), flow(other, positions).log_likelihood) < 1e-5
    compiled = torch.compile(Likelihood(flow, positions), backend="eager")
    assert torch.equal(compiled(other), flow(other, positions, impl="torch").log_likelihood)


class Likelihood(torch.nn.Module):
    def __init__(self, flow: ConditionalFlow, positions: PositionalRows) -> None:
        super().__init__()
        self.flow, self.positions = flow, positions

    def forward(self, x: Tensor) -> Tensor:
        return self.flow(x, self.positions).log_likelihood
