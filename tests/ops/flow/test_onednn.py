"""Wide flows whose weights are kept, with weights laid out by oneDNN, against the oracle in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbgad import ConditionalFlow, PositionalRows, reference
from fastbgad.flow_spec import FlowSpec
from fastbgad.ops.flow import onednn
from fastbgad.ops.flow.backend import FlowCall, FlowOptions
from fastbgad.ops.flow.folded import PortableWeights
from fastbgad.ops.flow.onednn import OnednnWeights

from ...flows import budget, double, lively_flow, relative_error

HEIGHT, WIDTH = 5, 13
needs_operators = pytest.mark.skipif(not onednn._has_operators(), reason="this PyTorch lacks oneDNN's operators")


def condition_of(kind: str, rows: int, channels: int) -> tuple[PositionalRows | None, Tensor | None]:
    if kind == "raster":
        return PositionalRows(HEIGHT, WIDTH, channels=channels), None
    if kind == "gathered":
        index = torch.randint(0, HEIGHT * WIDTH, (rows,), generator=torch.Generator().manual_seed(1))
        return PositionalRows(HEIGHT, WIDTH, index, channels), None
    return None, torch.randn(rows, channels) if kind == "dense" else None


def call_of(
    x: Tensor, flow: ConditionalFlow, condition: PositionalRows | Tensor | None, return_z: bool = False
) -> FlowCall:
    return FlowCall(x, flow.weights(), flow.spec, condition, None, x.dtype, False, FlowOptions(return_z))


@needs_operators
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("form", ["tanh", "scaled_tanh"])
@pytest.mark.parametrize(("kind", "rows"), [
    ("raster", HEIGHT * WIDTH), ("raster", 20 * HEIGHT * WIDTH), ("gathered", 1), ("gathered", 1023), ("dense", 1023),
    ("dense", 1), ("none", 130), ("none", 0),
])  # fmt: skip
@pytest.mark.parametrize("channels", [2, 9, 40])
def test_equals_the_oracle(
    channels: int, kind: str, rows: int, form: Any, hard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "CHUNK_BYTES", 60_000)  # several chunks
    spec = FlowSpec(channels, 0 if kind == "none" else 16, 3, clamp_form=form, hard_permutation=hard)
    flow = lively_flow(spec).requires_grad_(False)
    positions, dense = condition_of(kind, rows, 16)
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows))
    call = call_of(x, flow, dense if positions is None else positions, return_z=True)
    weights = onednn.prepare(call)
    assert weights.serves(positions, torch.float32)
    assert not weights.serves(positions, torch.float64)
    lp, log_det, z = onednn.infer(call, weights)
    exact_condition = positions.dense(rows, torch.float64, x.device) if positions is not None else dense
    exact_z, exact_det = reference.flow_forward(
        x.double(), double(flow.weights()), spec, None if exact_condition is None else exact_condition.double()
    )
    slack = budget(torch.float32, 20 * spec.coupling_layers)
    assert z is not None
    assert relative_error(z, exact_z) < slack
    terms = spec.clamp * spec.active_channels * spec.coupling_layers
    assert rows == 0 or float((log_det.double() - exact_det).abs().max()) < slack * terms
    assert relative_error(lp, reference.log_likelihood(exact_z, exact_det)) < slack
    without = onednn.infer(call_of(x, flow, call.condition), weights)
    assert without[2] is None
    assert torch.equal(without[0], lp)


@needs_operators
def test_a_lost_row_touches_no_other() -> None:
    spec = FlowSpec(10, 16, 2)
    flow = lively_flow(spec).requires_grad_(False)
    positions, _ = condition_of("raster", 0, 16)
    x = torch.randn(HEIGHT * WIDTH, 10)
    call = call_of(x, flow, positions)
    weights = onednn.prepare(call)
    expected = onednn.infer(call, weights)[0]
    x[7, 3] = math.nan
    found = onednn.infer(call, weights)[0]
    assert found[7].isnan()
    others = torch.arange(len(x)) != 7
    assert torch.equal(found[others], expected[others])


@needs_operators
@pytest.mark.parametrize("hard", [False, True])
def test_frozen_wide_flows_take_this_way(hard: bool) -> None:
    flow = ConditionalFlow(FlowSpec(401, 16, 1, hard_permutation=hard)).requires_grad_(False).freeze()
    positions, _ = condition_of("raster", 0, 16)
    x = torch.randn(HEIGHT * WIDTH, 401)
    found = flow(x, positions, impl="torch").log_likelihood
    assert flow._prepared is not None
    assert [type(weights) for weights in flow._prepared.values()] == [OnednnWeights]
    exact = flow(x.double(), positions, impl="reference").log_likelihood
    assert relative_error(found, exact) < budget(torch.float32, 20)
    # float64 takes the other one
    flow(x.double(), positions, impl="torch")
    assert [type(weights) for weights in flow._prepared.values()] == [OnednnWeights, PortableWeights]


def test_without_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_has_operators", lambda: False)
    flow = ConditionalFlow(FlowSpec(401, 16, 1)).requires_grad_(False).freeze()
    positions, _ = condition_of("raster", 0, 16)
    flow(torch.randn(HEIGHT * WIDTH, 401), positions, impl="torch")
    assert flow._prepared is not None
    assert [type(weights) for weights in flow._prepared.values()] == [PortableWeights]


def test_operators_that_do_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn._has_operators.cache_clear()
    try:
        monkeypatch.setattr(onednn, "_product", lambda x, weight, bias: x @ weight.T)
        assert not onednn._has_operators()
    finally:
        onednn._has_operators.cache_clear()
