"""Packing a flow's weights in one launch gives what packing them in plain PyTorch gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastbgad.flow_spec import FlowSpec
from fastbgad.kernels.flow.weights import FlowWeights
from fastbgad.ops import Geometry, MatmulPrecision, PositionalRows, pack_flow
from fastbgad.ops.flow.kernel_weights import fake_pack, flow_pack, plain_pack, stacked_codes
from tests.flows import lively_flow, whole_error
from tests.grids import grid, slow

pytestmark = pytest.mark.usefixtures("poisoned")


def arguments(spec: FlowSpec, kind: str, precision: MatmulPrecision, device: torch.device) -> tuple:
    """What the operator and its plain form are called with."""
    flow = lively_flow(spec).to(device)
    with torch.no_grad():  # where softplus is tiny, and where it is linear
        flow.module_list[0].global_scale[0, :2] = torch.tensor([-30.0, 60.0])
    weights = [tensor.detach() for layer in flow.weights() for tensor in layer]
    codes = stacked_codes(70, 9, spec.condition_channels, device) if kind == "positions" else None
    shape = (70, 9, spec.channels, spec.hidden_channels, spec.condition_channels)
    return weights, codes, *shape, kind == "dense", spec.global_affine, False, precision == "float16"


@pytest.mark.equivalence
@grid(
    precision=["float32", "float16"],
    kind=["none", "positions", "dense"],
    shape=[(8, 128), (41, 128), (64, 20), (200, 128)],
)
def test_equals_plain_packing(
    precision: MatmulPrecision, kind: str, shape: tuple[int, int], device: torch.device
) -> None:
    """To the last bits of float32 and, rounded from there, at most one step of float16 apart."""
    channels, condition = shape
    spec = FlowSpec(channels, 0 if kind == "none" else condition, 2)
    call = arguments(spec, kind, precision, device)
    packed, plain = FlowWeights(*flow_pack(*call)), FlowWeights(*plain_pack(*call))
    for name, value, exact in zip(FlowWeights._fields, packed, plain, strict=True):
        assert value.shape == exact.shape, name
        assert value.dtype == exact.dtype, name
        assert torch.equal(value == 0, exact == 0), name  # the padding is zero throughout
        if name == "tables" and exact.numel():
            assert whole_error(value, exact) < (1e-6 if precision == "float32" else 5e-5), name
        elif name in ("affine", "log_g"):
            assert torch.allclose(value, exact, rtol=2e-6, atol=1e-9), name
        else:
            assert torch.equal(value, exact), name


@pytest.mark.parametrize("affine", ["SOFTPLUS", "SIGMOID", "EXP"])
def test_global_affine(affine: str, device: torch.device) -> None:
    spec = FlowSpec(16, 0, 3, global_affine=affine)
    call = arguments(spec, "none", "float32", device)
    packed, plain = FlowWeights(*flow_pack(*call)), FlowWeights(*plain_pack(*call))
    assert torch.allclose(packed.affine, plain.affine, rtol=2e-6, atol=1e-9)
    assert torch.allclose(packed.log_g, plain.log_g, rtol=2e-6)


@pytest.mark.parametrize("kind", ["none", "positions", "dense"])
def test_the_fake_has_the_shapes_of_the_kernel(kind: str, device: torch.device) -> None:
    call = arguments(FlowSpec(9, 0 if kind == "none" else 128, 2), kind, "float16", device)
    for real, fake in zip(flow_pack(*call), fake_pack(*call), strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize("kind", [slow("none"), "positions", slow("dense")])
def test_registration(kind: str, device: torch.device) -> None:
    torch.library.opcheck(flow_pack, arguments(FlowSpec(9, 0 if kind == "none" else 16, 1), kind, "float16", device))


def test_weights_of_other_types_are_packed_plainly(device: torch.device) -> None:
    """Half-precision and strided parameters have no addresses of float32 values."""
    spec = FlowSpec(8, 128, 2)
    geometry = Geometry.of(PositionalRows(3, 4), "float16")
    flow = lively_flow(spec).to(device)
    rounded = [layer._replace(w1=layer.w1.half()) for layer in flow.weights()]
    strided = [layer._replace(w1=layer.w1.half().float().T.contiguous().T) for layer in flow.weights()]
    first, second = (pack_flow(layers, spec, geometry).tensors for layers in (rounded, strided))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_addresses_follow_the_tensors(device: torch.device) -> None:
    """The table of addresses is kept, the values behind them are read anew."""
    spec = FlowSpec(8, 128, 2)
    geometry = Geometry.of(PositionalRows(3, 4), "float32")
    flow = lively_flow(spec).to(device)
    before = pack_flow(flow.weights(), spec, geometry).tensors
    flow.module_list[1].subnet[0].weight.data.mul_(2)  # behind PyTorch's back
    after = pack_flow(flow.weights(), spec, geometry).tensors
    doubled: Tensor = after[0][1]
    assert torch.equal(doubled, 2 * before[0][1])
    assert torch.equal(after[0][0], before[0][0])
