"""The official code's loss and focal weights: values and gradients of its formulas, restated with boolean indexing."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from fastbgad.compat import bgad

from ...flows import budget, relative_error
from .official_formulas import DTYPES, chunk, exact_loss


def exact_weight(u: float, anomalous: bool) -> float:
    if anomalous:
        return 0.53 * (1 + math.exp(u)) ** 2 / abs(u) if u > -1 else 1.0
    return 11.7 * math.sqrt(1 - math.exp(u)) * abs(u) if u <= -0.2 else 1.0


@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 1023])
@pytest.mark.parametrize("case", ["mixed", "normal", "anomalous", "violating", "calm"])
def test_loss(case: str, rows: int, dtype: torch.dtype, weighted: bool, empty: str) -> None:
    lp, mask, edges = chunk(case, rows, dtype)
    weights = torch.rand(rows, dtype=dtype, generator=torch.Generator().manual_seed(1)) if weighted else None
    exact = lp.detach().double().requires_grad_()
    exact_weights = None if weights is None else weights.double()
    wanted = exact_loss(exact, mask, (edges[0].double(), edges[1].double()), 7.0, exact_weights)
    found = bgad.calculate_bg_spp_loss(lp, mask, edges, 7.0, weights, empty=empty)
    alone = bgad.calculate_bg_spp_loss_normal(lp, mask, edges, 7.0, weights, empty=empty)
    slack = budget(dtype, rows)
    for mine, theirs in (*zip(found, wanted, strict=True), (alone, wanted[0])):
        assert mine.dtype == dtype
        if theirs.isnan():
            assert mine.isnan() if empty == "nan" else mine == 0
        else:
            assert mine.item() == pytest.approx(theirs.item(), rel=slack, abs=slack)
        got = torch.autograd.grad(mine, lp, retain_graph=True)[0]
        assert relative_error(got, torch.autograd.grad(theirs, exact, retain_graph=True)[0]) < slack
        assert torch.isfinite(got).all()


def test_loss_passes_gradients_to_weights_and_boundaries() -> None:
    lp, mask, edges = chunk("mixed", 57, torch.float64)
    inputs = [lp, torch.rand(57, dtype=torch.float64).requires_grad_(), *(b.requires_grad_() for b in edges)]

    def total(loss) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(loss(lp, mask, edges, 10, inputs[1])), inputs)

    for mine, theirs in zip(total(bgad.calculate_bg_spp_loss), total(exact_loss), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_rows_that_take_no_part_do_no_harm(empty: str) -> None:
    """Infinite weights and NaN stay in their rows, and an empty term spoils no gradient of the others."""
    lp = torch.tensor([math.nan, -9.0, 0.0, math.inf, -3.0], requires_grad=True)
    mask, weights = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([math.inf, 2.0, math.inf, math.nan, math.inf])
    normal, anomalous = bgad.calculate_bg_spp_loss(lp, mask, (-0.5, 0.0), 10, weights, empty=empty)
    assert normal.item() == pytest.approx(0.8)
    assert anomalous.isnan() if empty == "nan" else anomalous == 0
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():  # it warns of being slow
        (normal + anomalous).backward()
    assert torch.allclose(lp.grad, torch.tensor([0, -0.2, 0, 0, 0]))


def test_loss_in_half_precision_does_not_overflow() -> None:
    lp = torch.full((4096,), -300.0, dtype=torch.float16)
    loss = bgad.calculate_bg_spp_loss_normal(lp, torch.zeros(4096), (0.0, -0.1))
    assert loss.dtype == torch.float16
    assert loss == 30


@pytest.mark.parametrize("anomalous", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_focal_weights(dtype: torch.dtype, anomalous: bool) -> None:
    weighting = bgad.abnormal_fl_weighting if anomalous else bgad.normal_fl_weighting
    lp = torch.cat([torch.linspace(-40, 20, 121, dtype=dtype), torch.tensor([-2.0, -10.0], dtype=dtype)])
    lp = lp[lp != 0]
    found = weighting(lp)
    wanted = torch.tensor([exact_weight(float(u), anomalous) for u in lp / 10], dtype=torch.float64)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, rtol=32 * torch.finfo(dtype).eps, atol=0)
    assert torch.allclose(weighting(4 * lp, normalizer=40), found, rtol=0, atol=0)
    assert weighting(torch.tensor([math.nan], dtype=dtype)) == 0
    assert weighting(torch.zeros(1, dtype=dtype)) == (math.inf if anomalous else 1)


def test_focal_weights_with_other_options_and_gradients() -> None:
    lp = torch.tensor([-30.0, -5.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    u = lp.detach() / 10
    hard = torch.where(u <= -0.2, 2 * (1 - u.exp()) ** 1.5 * u.abs(), 1.0)
    weights = bgad.normal_fl_weighting(lp, 1.5, 2)
    assert torch.allclose(weights, hard)
    weights.sum().backward()  # of rows with u > 0 the formula alone would be NaN
    assert torch.isfinite(lp.grad).all()
    assert lp.grad[2:].tolist() == [0, 0]
    assert torch.allclose(bgad.abnormal_fl_weighting(lp, 1, 3)[1:], 3 * (1 + u.exp()[1:]) / u.abs()[1:])
