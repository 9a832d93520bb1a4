"""Results and gradients of accelerated flows: FrEIA 0.2, FrEIA's main branch, anomalib's blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastbgad
from fastbgad.compat.freia import acceleration
from fastbgad.flow_spec import FlowSpec

from ...flows import budget, freia_flow, relative_error, whole_error
from .freia_flows import HEIGHT, WIDTH, error_of, flow_of, gradients, inputs

pytestmark = pytest.mark.usefixtures("few_rows_are_enough")


@pytest.mark.parametrize("rows", [1, 7, 1023])
@pytest.mark.parametrize("condition", [0, 8])
@pytest.mark.parametrize("channels", [2, 5, 8])
@pytest.mark.parametrize("kind", ["soft", "hard", "main soft", "main hard"])
def test_same_results_and_gradients(kind: str, channels: int, condition: int, rows: int) -> None:
    original = flow_of(kind, channels, condition)
    fast = copy.deepcopy(original)
    assert fastbgad.accelerate(fast) is fast
    assert fast.spec.clamp_form == ("scaled_tanh" if kind.startswith("main") else "tanh")
    assert fast.spec.hard_permutation == kind.endswith("hard")
    x, c = inputs(channels, condition, rows)
    for rev in (False, True):
        for found, expected in zip(fast(x, c, rev=rev), original(x, c, rev=rev), strict=True):
            assert found.shape == expected.shape
            assert found.dtype == expected.dtype
            assert error_of(found, expected, fast) < budget(torch.float64, 100)
    for found, expected in zip(gradients(fast, x, c), gradients(original, x, c), strict=True):
        assert relative_error(found, expected) < budget(torch.float64, 100 + 10 * rows)


@pytest.mark.parametrize("affine", ["SIGMOID", "EXP"])
def test_other_global_affines(affine: Any) -> None:
    original = freia_flow(FlowSpec(6, 4, 2, global_affine=affine))
    fast = fastbgad.accelerate(copy.deepcopy(original))
    assert fast.spec.global_affine == affine
    x, c = inputs(6, 4, 9)
    assert relative_error(fast(x, c)[0], original(x, c)[0]) < budget(torch.float64, 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["soft", "hard", "main hard", "anomalib"])
def test_narrow_types(kind: str, dtype: torch.dtype) -> None:
    """The results have the flow's own type and are no further from the exact ones than the original's."""
    exact_flow = flow_of(kind, 9, 8)
    original = copy.deepcopy(exact_flow).to(dtype)
    exact_flow.load_state_dict({name: t.double() for name, t in original.state_dict().items()})
    fast = fastbgad.accelerate(copy.deepcopy(original))
    x, c = inputs(9, 8, 65, dtype)
    exact = exact_flow(x.double(), [c[0].double()])
    for found, theirs, truth in zip(fast(x, c), original(x, c), exact, strict=True):
        assert found.dtype == theirs.dtype == dtype
        error = error_of(found, truth, fast)
        assert error < budget(dtype, 30)
        assert error <= 2 * error_of(theirs, truth, fast) + torch.finfo(dtype).eps


def test_positions_are_recognised() -> None:
    """The separable path gives what the dense condition gives; positions in any order, whole maps, one row."""
    original = flow_of("soft", 6, 128, layers=2)
    fast = fastbgad.accelerate(copy.deepcopy(original))
    area = HEIGHT * WIDTH
    for index in (None, torch.randperm(area)[:7], torch.tensor([4]), torch.randint(0, area, (70,))):
        where = fastbgad.positional_rows(HEIGHT, WIDTH, index, dtype=torch.float64)
        x, _ = inputs(6, 0, len(where))
        dense = where.values()
        for rev in (False, True):
            for found, expected in zip(fast(x, [where], rev=rev), original(x, [dense], rev=rev), strict=True):
                assert error_of(found, expected, fast) < budget(torch.float64, 100)
        theirs, _ = original(x, [where])  # the original takes it as a tensor
        assert torch.allclose(theirs, original(x, [dense])[0], rtol=0, atol=0)
        fast.zero_grad()
        fast(x, [where])[0].square().sum().backward()
        original.zero_grad()
        original(x, [dense])[0].square().sum().backward()
        for a, b in zip(fast.parameters(), original.parameters(), strict=True):
            if b.grad is not None:
                assert relative_error(a.grad, b.grad) < budget(torch.float64, 500)


@pytest.mark.equivalence
@pytest.mark.parametrize("places", [False, True], ids=["dense", "places"])
@pytest.mark.parametrize("kind", ["soft", "hard", "main soft"])
def test_on_the_kernels(kind: str, places: bool, device: torch.device) -> None:
    """The same through Triton's kernels, on a GPU or in the interpreter, with the float32 operands of `accelerate`."""
    exact_flow = flow_of(kind, 6, 128, layers=2)
    original = copy.deepcopy(exact_flow).float()
    exact_flow.load_state_dict({name: t.to(exact_flow.state_dict()[name]) for name, t in original.state_dict().items()})
    fast = fastbgad.accelerate(original.to(device), impl="triton")
    area = HEIGHT * WIDTH
    where = fastbgad.positional_rows(HEIGHT, WIDTH, torch.randperm(area, device=device))
    x = torch.randn(area, 6, generator=torch.Generator().manual_seed(0))
    exact = exact_flow(x.double(), [where.values().cpu().double()])
    found = fast(x.to(device), [where if places else where.values()])
    for value, truth in zip(found, exact, strict=True):
        assert error_of(value.cpu(), truth, fast) < 2e-5
    weight = torch.linspace(0.5, 1.5, area)
    for flow, (z, log_det) in ((exact_flow, exact), (fast, found)):
        flow.zero_grad()
        (weight.to(z) * (z.square().sum(dim=1) - log_det)).mean().backward()
    for a, b in zip(fast.parameters(), exact_flow.parameters(), strict=True):
        if b.grad is not None:
            assert whole_error(a.grad.cpu(), b.grad) < 1e-3


def test_frozen_and_mixed_parameters() -> None:
    original = flow_of("soft", 5, 8)
    fast = fastbgad.accelerate(copy.deepcopy(original))
    x, c = inputs(5, 8, 30)
    for flow in (original, fast):
        flow.requires_grad_(False)
        flow.module_list[1].subnet.requires_grad_(True)
        flow.module_list[2].global_offset.requires_grad_(True)
    found, expected = gradients(fast, x, c), gradients(original, x, c)
    assert len(found) == len(expected) == 2 + 4 + 1
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < budget(torch.float64, 500)
    fast.requires_grad_(False)
    assert not fast(x, c)[0].requires_grad


def test_a_trained_permutation_runs_the_original() -> None:
    flow = fastbgad.accelerate(flow_of("soft", 5, 8))
    x, c = inputs(5, 8, 6)
    flow.module_list[0].w_perm.requires_grad_(True)
    with pytest.warns(UserWarning, match="w_perm requires a gradient"):
        z, _ = flow(x, c)
    z.sum().backward()
    assert flow.module_list[0].w_perm.grad is not None
    with torch.no_grad():
        assert torch.allclose(flow(x, c)[0], z)


def test_training_calls_of_few_rows_run_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "FEWEST_TRAINING_ROWS", 8)
    original = flow_of("soft", 5, 128)
    fast, explicit = (fastbgad.accelerate(copy.deepcopy(original), impl=impl) for impl in ("auto", "torch"))
    calls: list[nn.Module] = []
    for flow in (fast, explicit):
        flow.module_list[0].register_forward_hook(lambda block, *_: calls.append(block))
    for rows, own in ((7, True), (8, False)):
        x = inputs(5, 0, rows)[0]
        where = fastbgad.positional_rows(HEIGHT, WIDTH, torch.arange(rows), dtype=torch.float64)
        expected = original(x, [where.values()])
        for flow in (fast, explicit):
            calls.clear()
            assert torch.allclose(flow(x, [where])[0], expected[0], rtol=1e-9)
            assert calls == ([fast.module_list[0]] if own and flow is fast else [])
            with torch.no_grad():
                assert torch.allclose(flow(x, [where])[1], expected[1], rtol=1e-9)
            assert len(calls) == int(own and flow is fast)


def test_autocast_and_tuple_output() -> None:
    flow = flow_of("soft", 6, 8).float()
    fast = fastbgad.accelerate(copy.deepcopy(flow))
    x, c = inputs(6, 8, 20, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = fast(x.bfloat16(), [c[0].bfloat16()])
    assert z.dtype == log_det.dtype == torch.float32
    assert relative_error(z, flow(x.bfloat16().float(), [c[0].bfloat16().float()])[0]) < 1e-5
    fast.force_tuple_output = True
    (inner,), _ = fast((x,), c)
    assert torch.allclose(inner, flow(x, c)[0], atol=1e-5)


def test_no_rows() -> None:
    fast = fastbgad.accelerate(flow_of("soft", 6, 8))
    z, log_det = fast(torch.empty(0, 6).double(), [torch.empty(0, 8).double()])
    assert z.shape == (0, 6)
    assert log_det.shape == (0,)
