"""What surrounds the wide flow's arithmetic: registration, compilers, memory, and a CPU without the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastbgad.errors import BackendError
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import PositionalRows
from fastbgad.ops.flow import wide
from fastbgad.ops.flow.wide_products import add_product, hidden_units, product
from tests.flows import whole_error
from tests.wide_flows import Case, interpreter_tiles, run_wide


@pytest.fixture(autouse=True)
def _tiles(device: torch.device, tmp_path: Path, poisoned: None) -> Iterator[None]:
    yield from interpreter_tiles(device, tmp_path)


def test_kept_bytes(device: torch.device) -> None:
    """What the module says training keeps per row and layer (the first layer's input is x itself)."""
    case = Case(device, 10, 12, coupling_layers=3)
    hidden = case.spec.hidden_channels
    for precision, per_layer in (("float16", 4 * 6 + 2 * hidden), ("float32", 8 * 6 + 4 * hidden)):
        kept = wide.flow_wide(*case.operator_arguments(precision, keep=True))[3:]
        assert sum(tensor.nbytes for tensor in kept) == 10 * (3 * per_layer + 2 * 4 * 12)
    assert not any(t.numel() for t in wide.flow_wide(*case.operator_arguments("float16", keep=False))[3:])


def test_large_training_sets_keep_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(device, 20, 9, coupling_layers=2)
    keep = []
    operator = wide.flow_wide

    def spy(*arguments: Any) -> tuple[Tensor, ...]:
        keep.append(arguments[-1])
        return operator(*arguments)

    monkeypatch.setattr(wide, "flow_wide", spy)
    gradients = []
    for limit in (1 << 20, 100):
        monkeypatch.setattr(wide, "MOST_SAVED_BYTES", limit)
        gradients += torch.autograd.grad(case.run("float32", chunk_rows=20)[0].sum(), [case.x])
    assert keep == [True, False]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("kind", "keep"), [("dense", True), ("gathered", False)])
def test_opcheck(device: torch.device, kind: str, keep: bool) -> None:
    case = Case(device, 10, 6, kind, coupling_layers=2)
    torch.library.opcheck(wide.flow_wide, case.operator_arguments("float16", keep))
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in case.operator_arguments("float16", keep)]
    arguments[3] = [tensor.detach() for tensor in arguments[3]]
    lp, log_det, z, *kept = wide.flow_wide(*arguments)
    options = (*arguments[:12], keep, True, kind == "dense")
    torch.library.opcheck(wide.flow_wide_backward, (lp, log_det, z, lp, *kept, *options))


def test_compiled(device: torch.device) -> None:
    """No graph break, forward or back, and the same bits."""
    case = Case(device, 12, 6, "gathered", coupling_layers=2)

    def loss(x: Tensor) -> Tensor:
        lp, log_det, _ = run_wide(x, case.flow.weights(), case.spec, case.condition, False, "float16")
        return lp.sum() + log_det.mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    parameters = [case.x, *(p for p in case.flow.parameters() if p.requires_grad)]
    expected, got = (torch.autograd.grad(run(case.x), parameters) for run in (loss, compiled))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported graphs run there on the portable path; training is refused by name."""
    case = Case(torch.device("cpu"), 12, 9, "gathered", coupling_layers=2)
    arguments = case.operator_arguments("float32", keep=False)
    expected = wide.flow_wide(*arguments)

    class Exported(torch.nn.Module):
        def __init__(self, flow: ConditionalFlow) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            positions = PositionalRows(11, 7, index, channels=8)
            with torch.no_grad():
                return run_wide(x, self.flow.weights(), case.spec, positions, False, "float32")[0]

    program = torch.export.export(Exported(case.flow), (case.x.detach(), arguments[2]))
    monkeypatch.setattr("fastbgad.ops.registration.interpreting", lambda: False)
    for value, truth in zip(wide.flow_wide(*arguments)[:3], expected[:3], strict=True):
        assert whole_error(value, truth) < 1e-5
    assert whole_error(program.module()(case.x.detach(), arguments[2]), expected[0]) < 1e-5
    with pytest.raises(BackendError, match="trains on CUDA"):
        case.run("float32")
    lp, _, _ = case.run("float32", recompute=True)
    with pytest.raises(BackendError, match="trains on CUDA"):
        lp.sum().backward()


def test_products_on_a_gpu_take_these_arguments() -> None:
    """The calls that only CUDA tensors reach, on tensors without data: shapes, types and strides are accepted."""
    with FakeTensorMode():
        a, b = torch.empty(64, 32, device="cuda").half(), torch.empty(16, 32, device="cuda").half()
        for total in (torch.empty(64, 16, device="cuda"), torch.empty(64, 40, device="cuda")[:, :16]):
            add_product(total, a, b.T)
            assert product(a, b.T, total.clone()).dtype == torch.float32
        assert product(a, b.T, total.half().contiguous()).dtype == torch.float16
        hidden_units(a, b, torch.empty(16, device="cuda").half(), total.half().contiguous())
