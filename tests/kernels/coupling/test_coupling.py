"""The coupling kernels one by one, where the tests of the wide flow do not reach."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch

from fastbgad.kernels.coupling.backward import coupling_backward
from fastbgad.kernels.coupling.forward import Coupling, coupling_forward
from fastbgad.kernels.coupling.operands import coupling_clear, coupling_operand, coupling_rows
from tests.flows import whole_error

pytestmark = pytest.mark.usefixtures("poisoned")


def plain_layer(channels: int, device: torch.device, scaled_tanh: bool = False) -> Coupling:
    """v = y."""
    zeros = torch.zeros(channels, device=device)
    return Coupling(zeros[: channels // 2 * 2], torch.ones(channels, device=device), zeros, None, 1.9, scaled_tanh)


@pytest.mark.parametrize("scaled_tanh", [False, True])
def test_saturation(device: torch.device, scaled_tanh: bool) -> None:
    """Activations far beyond where tanh is flat: no overflow on the way, s = +-clamp, and no gradient."""
    a_s = torch.tensor([-3e38, -1e4, 0.0, 1e4, 3e38], device=device)
    a = torch.stack([a_s, torch.zeros_like(a_s)], dim=1)
    x, zeros = torch.ones(5, 2, device=device), torch.zeros(5, device=device)
    layer = plain_layer(2, device, scaled_tanh)
    v, log_det, _ = coupling_forward(x, a, layer, zeros)
    s = 1.9 * torch.tensor([-1.0, -1, 0, 1, 1], device=device)
    assert whole_error(log_det, s) < 1e-6
    assert whole_error(v[:, 1], s.exp()) < 1e-6
    _, da, *_ = coupling_backward(x, a, layer, torch.ones_like(v), None, torch.ones(5, device=device))
    slope = 0.1 if scaled_tanh else 0.19  # ds/da at 0; the factor is dy2 x2 exp(s) + d_log_det = 2
    assert torch.allclose(da[:, 0], torch.tensor([0, 0, 2 * slope, 0, 0], device=device))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_log_det_tells_what_is_lost(device: torch.device, bad: float) -> None:
    """One number anywhere in a row, and that row alone; the odd last channel has no partner."""
    x, log_det = torch.ones(9, 5, device=device), torch.zeros(9, device=device)
    for dtype in (torch.float16, torch.float32):
        a = torch.ones(9, 4, device=device, dtype=dtype)
        places = [(x, 0), (x, 2), (x, 3), (x, 4), (a, 0), (a, 1), (a, 2), (a, 3)]
        for row, (tensor, column) in enumerate(places):
            tensor[row, column] = bad
        _, got, _ = coupling_forward(x, a, plain_layer(5, device), log_det)
        assert got.isnan().tolist() == [True] * 8 + [False]
        x.fill_(1)
    log_det[4] = bad
    _, got, _ = coupling_forward(x, torch.ones(9, 4, device=device), plain_layer(5, device), log_det)
    assert got.isfinite().tolist() == [True] * 4 + [False] + [True] * 4


def test_what_float16_cannot_hold(device: torch.device) -> None:
    """Beyond 65504 a state loses its row where products read it in 16 bits, and becomes infinite there."""
    x = torch.ones(4, 4, device=device)
    x[0, 1], x[1, 2], x[2, 0] = 65505, -65505, 65504
    zeros, layer = torch.zeros(4, device=device), plain_layer(4, device)
    _, narrow, _ = coupling_forward(x, torch.zeros(4, 4, device=device).half(), layer, zeros)
    _, wide, _ = coupling_forward(x, torch.zeros(4, 4, device=device), layer, zeros)
    assert narrow.isnan().tolist() == [True, True, False, False]
    assert wide.isfinite().all()
    # x fits, v = g y does not
    x = torch.ones(4, 4, device=device)
    x[0, 1], x[1, 2] = 4e4, 4e4
    _, narrow, _ = coupling_forward(x, torch.zeros(4, 4, device=device).half(), layer._replace(g=2 * layer.g), zeros)
    assert narrow.isnan().tolist() == [True, True, False, False]
    x[0, 1] = 1e5
    out = torch.empty(4, 12, dtype=torch.float16, device=device)
    coupling_operand(x, out, three=True)
    assert out[0, 1].isinf()
    assert out[0, 5].isinf()  # high + low is NaN
    assert out[1:].isfinite().all()


def test_rows_are_told_apart(device: torch.device) -> None:
    x = torch.randn(37, 301, device=device)
    x[[3, 20], [300, 0]] = torch.tensor([float("nan"), -2e3], device=device)
    clean, lost = coupling_rows(x, 1e3)
    assert lost.nonzero()[:, 0].tolist() == [3, 20]
    assert torch.equal(clean, x.masked_fill(lost[:, None], 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_are_cleared(device: torch.device, dtype: torch.dtype) -> None:
    """In every layer, also where each layer has room for more rows than are there."""
    data = torch.randn(3, 40, 301, device=device).to(dtype)
    data[:, 5], data[1, 7] = float("nan"), float("inf")
    lost = torch.zeros(37, dtype=torch.bool, device=device)
    lost[[5, 7, 36]] = True
    expected = data.clone()
    expected[:, :37][:, lost] = 0
    coupling_clear(data[:, :37], lost)
    assert torch.equal(data, expected)
    coupling_clear(data[:0, :37], lost)
