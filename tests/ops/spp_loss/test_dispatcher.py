"""The losses: portable path against the oracle, and the oracle against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from fastbgad import reference
from fastbgad.errors import ConfigError
from fastbgad.ops import contrastive_loss, spp_loss

CASES = {
    "mixed": lambda: (4 * torch.randn(1023, dtype=torch.float64) - 3, torch.rand(1023) < 0.2),
    "one row": lambda: (torch.tensor([-1.5], dtype=torch.float64), torch.tensor([False])),
    "no anomalies": lambda: (torch.randn(63, dtype=torch.float64), torch.zeros(63, dtype=torch.bool)),
    "only anomalies": lambda: (torch.randn(63, dtype=torch.float64), torch.ones(63, dtype=torch.bool)),
    "all violating": lambda: (torch.full((64,), -2.0, dtype=torch.float64), torch.arange(64) % 2 == 0),
    "no anomaly violating": lambda: (
        torch.cat([torch.rand(50, dtype=torch.float64), torch.full((9,), -40.0, dtype=torch.float64)]),
        torch.arange(59) >= 50,
    ),
    "ties": lambda: (torch.randn(500, dtype=torch.float64).round() * 5, torch.rand(500) < 0.3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("ml_form", "reduction", "focal", "push"),
    list(itertools.product(["logsigmoid", "nll"], ["mean", "sum"], [False, True], [True, False])),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_oracle(case: str, ml_form: str, reduction: str, focal: bool, push: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    lp, anomalous = CASES[case]()
    lp = lp.to(dtype)  # both see the same rounded values, so the same rows violate
    options = {
        "beta": 0.05, "tau": 0.3, "lam": 0.7, "normalizer": 5.0, "ml_form": ml_form, "reduction": reduction,
        "focal": focal, "push": push,
    }  # fmt: skip
    fast_lp, exact_lp = lp.clone().requires_grad_(), lp.double().requires_grad_()
    # The boundary's division by the normalizer rounds: a row that lies on it must violate in both types.
    fast = spp_loss(fast_lp, anomalous, 40, impl="torch", **options)
    exact = spp_loss(exact_lp, anomalous, 40, impl="reference", **options)
    fast.total.backward()
    exact.total.backward()
    rounding = 4 * math.sqrt(len(lp)) * torch.finfo(dtype).eps
    for name in ("total", "ml", "normal", "anomalous"):
        value, truth = (float(getattr(loss, name).detach()) for loss in (fast, exact))
        assert math.isfinite(truth)
        assert value == pytest.approx(truth, rel=rounding, abs=rounding), name
    for name in ("normal_violations", "anomalous_violations"):
        count = getattr(fast, name)
        assert count.dtype == torch.int64
        assert not count.requires_grad
        assert torch.equal(count, getattr(exact, name)), name
    assert torch.allclose(fast_lp.grad.double(), exact_lp.grad, rtol=rounding, atol=rounding / len(lp))


def test_by_hand() -> None:
    """Four normals, two anomalies, every term worked out."""
    lp = torch.tensor([-8.0, -2.0, -1.0, 0.0, -5.0, -30.0], dtype=torch.float64)
    anomalous = torch.tensor([False, False, False, False, True, True])
    # normals sorted: -8, -2, -1, 0; int(4 * 0.3) = 1, so b_n = -0.2 and b_a = -0.3
    for impl in ("torch", "reference"):
        loss = spp_loss(lp, anomalous, 2, beta=0.3, tau=0.1, ml_form="nll", impl=impl)
        assert float(loss.b_n) == -0.2
        assert float(loss.b_a) == pytest.approx(-0.3, abs=1e-15)
        assert float(loss.ml) == pytest.approx(2 * (8 + 2 + 1 + 0) / 4)
        assert float(loss.normal) == pytest.approx(((-0.2 + 0.8) + 0) / 2)  # u = -0.8 and -0.2 violate
        assert float(loss.anomalous) == 0  # u = -0.5 and -3 lie below b_a
        assert int(loss.normal_violations) == 2
        assert int(loss.anomalous_violations) == 0
        summed = spp_loss(lp, anomalous, 2, beta=0.3, tau=0.5, reduction="sum", impl=impl)
        assert float(summed.normal) == pytest.approx(0.6)
        assert float(summed.anomalous) == pytest.approx(-0.5 + 0.7)  # b_a = -0.7: u = -0.5 violates
        half = spp_loss(lp, anomalous, 2, beta=0.3, tau=0.5, push=False, impl=impl)
        assert int(half.anomalous_violations) == 1  # counted whether or not the term is part of the loss


def test_focal_weights_by_hand() -> None:
    lp = torch.tensor([-1.0, -2.0, -20.0, -5.0, -10.0, -15.0], dtype=torch.float64)
    anomalous = torch.tensor([False, False, False, True, True, True])
    expected = [
        1.0,
        11.7 * math.sqrt(1 - math.exp(-0.2)) * 0.2,
        11.7 * math.sqrt(1 - math.exp(-2)) * 2,
        0.53 * (1 + math.exp(-0.5)) ** 2 / 0.5,
        1.0,
        1.0,
    ]
    assert torch.allclose(reference.focal_weights(lp, anomalous), torch.tensor(expected, dtype=torch.float64))


def test_empty_terms_are_zero_with_zero_gradient() -> None:
    for impl in ("torch", "reference"):
        lp = torch.tensor([0.5, 0.7, -90.0], requires_grad=True)
        loss = spp_loss(lp, torch.tensor([False, False, True]), 3, lam=1.0, impl=impl)
        loss.anomalous.backward()
        assert float(loss.anomalous.detach()) == 0
        assert torch.equal(lp.grad, torch.zeros(3))


def test_rows_outside_a_term_may_hold_anything() -> None:
    """An anomalous row far away (exp overflows, focal weight infinite) does not leak into the normal terms."""
    lp = torch.tensor([-1.0, -2.0, 3e38], requires_grad=True)
    loss = spp_loss(lp, torch.tensor([False, False, True]), 3, focal=True, push=False)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert float(lp.grad[2]) == 0


@pytest.mark.parametrize("case", CASES)
def test_contrastive_equals_oracle(case: str) -> None:
    torch.manual_seed(2)
    lp, anomalous = CASES[case]()
    fast_u, exact_u = (lp / 10).requires_grad_(), (lp / 10).detach().requires_grad_()
    fast_u = fast_u.detach().requires_grad_()
    fast = contrastive_loss(fast_u, anomalous, 0.3)
    exact = contrastive_loss(exact_u, anomalous, 0.3, impl="reference")
    sum(fast).backward()
    sum(exact).backward()
    for value, truth in zip(fast, exact, strict=True):
        assert float(value) == pytest.approx(float(truth), rel=1e-12, abs=1e-14)
    assert torch.allclose(fast_u.grad, exact_u.grad, rtol=1e-10, atol=1e-14)


def test_nothing_waits_for_the_device() -> None:
    """Tensors without data: what would have to be read on the host raises an error."""
    with FakeTensorMode():
        lp, anomalous = torch.randn(50, requires_grad=True), torch.zeros(50, dtype=torch.bool)
        spp_loss(lp, anomalous, 3, focal=True, impl="torch").total.backward()
        with pytest.raises(DynamicOutputShapeException):
            spp_loss(lp, anomalous, 3, impl="reference")


@pytest.mark.parametrize("bad", [{"ml_form": "mse"}, {"reduction": "max"}, {"beta": 2.0}, {"impl": "cuda"}])
def test_bad_options(bad: dict) -> None:
    with pytest.raises(ConfigError):
        spp_loss(torch.zeros(3), torch.zeros(3, dtype=torch.bool), 3, **bad)
