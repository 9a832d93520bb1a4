"""The backend that serves a call of the flow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastbgad.errors import BackendError
from fastbgad.flow_spec import FlowSpec
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import Impl, PositionalRows
from fastbgad.ops.flow import onednn
from fastbgad.ops.flow.backend import FlowBackend, FlowCall, FlowOptions
from fastbgad.ops.flow.choice import COMPILED, ONEDNN, PORTABLE, REFERENCE, choose
from fastbgad.ops.native.build import why_not_native

WIDE = 420  # beyond the channels that compiled C++ serves
needs_compiler = pytest.mark.skipif(why_not_native() is not None, reason="no compiler")


def call_of(
    channels: int = 9,
    condition: PositionalRows | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    needs_grad: bool = False,
    **options: object,
) -> FlowCall:
    spec = FlowSpec(channels, 0 if condition is None else 8, 1)
    layers = ConditionalFlow(spec, seed=None).weights()
    x = torch.zeros(6, channels, dtype=dtype)
    return FlowCall(x, layers, spec, condition, None, dtype, needs_grad, FlowOptions(**options))  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.parametrize(
    ("impl", "call", "backend"),
    [
        ("reference", call_of(), REFERENCE),
        ("torch", call_of(), PORTABLE),
        ("native", call_of(), COMPILED),
        ("auto", call_of(), COMPILED),
        ("auto", call_of(condition=PositionalRows(2, 3, channels=8)), COMPILED),
        ("auto", call_of(needs_grad=True), COMPILED),
        ("auto", call_of(condition=torch.zeros(6, 8)), PORTABLE),
        ("auto", call_of(channels=WIDE), PORTABLE),
        ("auto", call_of(dtype=torch.float64), PORTABLE),
        ("auto", call_of(chunk_rows=2), PORTABLE),
        ("native", call_of(chunk_rows=2), COMPILED),
        ("auto", call_of(matmul_precision="bfloat16"), COMPILED),
        ("auto", call_of(needs_grad=True, matmul_precision="bfloat16"), PORTABLE),
    ],
)
def test_on_a_cpu(impl: Impl, call: FlowCall, backend: FlowBackend) -> None:
    assert choose(impl, call) is backend


@pytest.mark.skipif(not onednn._has_operators(), reason="this PyTorch lacks oneDNN's operators")
def test_onednn_serves_calls_with_weights_of_its_own() -> None:
    call = call_of(channels=WIDE)
    assert choose("torch", call, keeps=True) is ONEDNN
    prepared = onednn.prepare(call)
    assert choose("torch", call, prepared) is ONEDNN
    assert choose("torch", call_of(channels=WIDE, chunk_rows=2), prepared) is PORTABLE
    assert choose("torch", call_of(channels=WIDE, needs_grad=True), prepared) is PORTABLE
    assert choose("torch", call_of(channels=WIDE, dtype=torch.float64), prepared) is PORTABLE
    elsewhere = call_of(channels=WIDE, condition=PositionalRows(2, 3, channels=8))
    assert choose("torch", elsewhere, prepared) is PORTABLE
    assert choose("torch", call_of(), keeps=True) is PORTABLE


@needs_compiler
@pytest.mark.parametrize("call", [call_of(channels=WIDE), call_of(dtype=torch.float64)], ids=["channels", "type"])
def test_an_explicit_request_never_falls_back(call: FlowCall) -> None:
    with pytest.raises(BackendError, match='impl="native"'):
        choose("native", call)
