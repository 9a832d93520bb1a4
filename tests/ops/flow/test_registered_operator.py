"""What surrounds the flow's kernels: registration, compilers and exporters, frozen flows, what the door refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.errors import BackendError, ConfigError, FeatureError
from fastbgad.flow_spec import FlowSpec
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import Geometry, PositionalRows, flow_forward, pack_flow
from fastbgad.ops.flow.registered import flow_infer, flow_train
from tests.flow_problems import HEIGHT, LP_TOLERANCE, WIDTH, Problem
from tests.flows import double, lively_flow, whole_error

pytestmark = pytest.mark.usefixtures("poisoned", "large_tiles")


def test_registered_operators(device: torch.device) -> None:
    """opcheck: schema, fake tensors, autograd registration and tracing agree with the kernels."""
    problem = Problem("gathered", 9, 8, device)
    pack = pack_flow(problem.flow.weights(), problem.spec, Geometry.of(problem.condition, "float16"))
    where = (problem.rows, True, None, HEIGHT, WIDTH)
    shape = (problem.spec.hidden_channels, 1.9, False)
    torch.library.opcheck(flow_infer, (problem.x, pack.tensors, *where, *shape, True))
    weights = [t.detach().requires_grad_(i % 7 != 6) for layer in problem.flow.weights() for i, t in enumerate(layer)]
    torch.library.opcheck(flow_train, (problem.x, weights, pack.tensors, *where, 128, *shape, True, False))


class Scores(torch.nn.Module):
    """A flow as a compiler or an exporter sees it."""

    def __init__(self, flow: ConditionalFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow(x, PositionalRows(HEIGHT, WIDTH), impl="triton").log_likelihood


def test_compile_and_export(device: torch.device) -> None:
    """One graph without a break, with the same values; the exported program keeps the operator."""
    model = Scores(lively_flow(FlowSpec(8, 128, 2), gain=1.0).to(device))
    x = torch.randn(HEIGHT * WIDTH, 8, device=device)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, rtol=1e-4)
    compiled(x).sum().backward()
    got = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    expected.sum().backward()
    exact = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(whole_error(a, b) < 1e-5 for a, b in zip(got, exact, strict=True))
    program = torch.export.export(model.requires_grad_(False), (x,))
    nodes = [node for part in program.graph_module.modules() for node in part.graph.nodes]
    assert any("flow_infer" in str(node.target) for node in nodes)
    # Inference adds the bias of a map's pixels in another order than training does.
    assert torch.allclose(program.module()(x), expected, rtol=1e-4)


def test_autocast_changes_nothing(device: torch.device) -> None:
    problem = Problem("positions", 20, 8, device)
    expected = problem.run("float32").log_likelihood
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = problem.run("float32").log_likelihood
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_frozen_flow(device: torch.device) -> None:
    """A frozen flow gives the same values, packs once, and notices weights that change."""
    flow = lively_flow(FlowSpec(8, 128, 2), gain=1.0).to(device).requires_grad_(False)
    x, positions = torch.randn(HEIGHT * WIDTH, 8, device=device), PositionalRows(HEIGHT, WIDTH)
    expected = flow(x, positions, impl="triton").log_likelihood
    flow.freeze()
    assert torch.equal(flow(x, positions, impl="triton").log_likelihood, expected)
    assert flow._prepared is not None
    (first,) = flow._prepared.values()
    flow(x, positions, impl="triton")
    assert flow._prepared.values()[0] is first
    flow.module_list[0].global_scale += 1
    changed = flow(x, positions, impl="triton").log_likelihood
    assert not torch.equal(changed, expected)
    assert torch.allclose(changed, flow(x, positions, impl="torch").log_likelihood, rtol=1e-3)
    flow(x, positions, impl="torch")  # other implementations are not affected
    twin = copy.deepcopy(flow)
    assert twin._prepared.values() == []
    assert torch.equal(twin(x, positions, impl="triton").log_likelihood, changed)
    assert flow.double()._prepared.values() == []


def test_gradients_have_the_strides_of_the_fake(device: torch.device) -> None:
    """A compiler holds the operator's results against those of its fake; 32 channels have no padding to cut off."""
    problem = Problem("positions", 10, 32, device)
    x = problem.x.clone().requires_grad_()
    parameters = [p for p in problem.flow.parameters() if p.requires_grad]

    def step(x: Tensor) -> Tensor:
        return problem.flow(x, problem.condition, impl="triton").log_likelihood.sum()

    for gradient, of in zip(torch.autograd.grad(step(x), [x, *parameters]), [x, *parameters], strict=True):
        assert gradient.shape == of.shape
    from fastbgad.ops.flow.registered import _fake_train_backward, flow_train_backward

    pack = pack_flow(problem.flow.weights(), problem.spec, Geometry.of(problem.condition, "float16"))
    assert isinstance(problem.condition, PositionalRows)
    where = (problem.condition.index, False, None, HEIGHT, WIDTH)
    shape = (128, problem.spec.hidden_channels, 1.9, False)
    weights = [t for layer in problem.flow.weights() for t in layer]
    lp, _, _, *saved = flow_train(x, weights, pack.tensors, *where, *shape, False, False)
    arguments = (
        x.detach(), pack.tensors, saved, lp.detach(), torch.ones_like(lp), None, None, *where, *shape, True
    )  # fmt: skip
    for real, fake in zip(flow_train_backward(*arguments), _fake_train_backward(*arguments), strict=True):
        assert real.shape == fake.shape
        assert real.stride() == fake.stride()


def test_a_condition_of_many_channels_goes_through_the_library(device: torch.device) -> None:
    """More condition channels than one operand holds."""
    spec = FlowSpec(8, 256, 2)
    flow = lively_flow(spec, gain=1.0).to(device)
    x, p = torch.randn(20, 8, device=device), torch.randn(20, 256, device=device)
    out = flow_forward(x, flow.weights(), spec, p, impl="triton", matmul_precision="float32")
    z, log_det = reference.flow_forward(x.double(), double(flow.weights()), spec, p.double())
    assert whole_error(out.log_likelihood, reference.log_likelihood(z, log_det)) < LP_TOLERANCE["float32"]


def test_a_pack_of_another_geometry_is_refused(device: torch.device) -> None:
    problem = Problem("raster", 77, 8, device)
    pack = pack_flow(problem.flow.weights(), problem.spec, Geometry.of(PositionalRows(7, 11), "float16"))
    with torch.no_grad(), pytest.raises(ConfigError, match="prepared for"):
        problem.run(pack=pack)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(4)}, "rows must be int32 or int64"),
        ({"rows": torch.zeros(4, 1, dtype=torch.int64)}, "rows must be int32 or int64"),
        ({"condition": PositionalRows(1, 4, torch.zeros(4).long()), "rows": torch.zeros(2).int()}, "whole maps"),
        ({"rows": torch.tensor([0, 4])}, r"rows must lie in \[0, 4\)"),
        ({"matmul_precision": "tf32"}, "matmul_precision is 'tf32'"),
    ],
)  # fmt: skip
def test_bad_input(change: dict, message: str) -> None:
    spec = FlowSpec(8, 128, 1)
    flow = ConditionalFlow(spec)
    options = {"condition": PositionalRows(2, 2), **change}
    with pytest.raises((FeatureError, ConfigError), match=message):
        flow_forward(torch.zeros(4, 8), flow.weights(), spec, **options)


def test_what_the_kernels_cannot_do_is_said(device: torch.device) -> None:
    problem = Problem("positions", 8, 8, device)
    with pytest.raises(BackendError, match="float64"):
        flow_forward(problem.x.double(), double(problem.flow.weights()), problem.spec, problem.condition, impl="triton")
    problem = Problem("dense", 8, 8, device)
    assert isinstance(problem.condition, Tensor)
    problem.condition.requires_grad_()
    with pytest.raises(BackendError, match="dense condition"):
        flow_forward(problem.x, problem.flow.weights(), problem.spec, problem.condition, impl="triton")


def test_tensors_on_different_devices_are_refused() -> None:
    """Named by tensor; "meta" stands for a second device."""
    flow = ConditionalFlow(FlowSpec(8, 128, 1))
    x, positions, elsewhere = torch.zeros(4, 8), PositionalRows(2, 2), torch.device("meta")
    with pytest.raises(FeatureError, match="features are on meta but the flow is on cpu"):
        flow(x.to(elsewhere), positions)
    with pytest.raises(FeatureError, match="features are on cpu but rows is on meta"):
        flow(x, positions, rows=torch.zeros(2, dtype=torch.int64, device=elsewhere))
    with pytest.raises(FeatureError, match="features are on cpu but the condition is on meta"):
        flow(x, torch.zeros(4, 128, device=elsewhere))
