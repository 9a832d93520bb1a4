"""The explicit boundary: portable path against the oracle and against sorting by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fastbgad.errors import ConfigError, FeatureError
from fastbgad.ops import boundary


@pytest.mark.parametrize("rows", [1, 2, 63, 1023, 5000])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.05, 0.999])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("ties", [False, True])
def test_order_statistic(rows: int, beta: float, share: float, ties: bool) -> None:
    torch.manual_seed(rows)
    lp = torch.randn(rows, dtype=torch.float64)
    if ties:
        lp = lp.round()
    anomalous = torch.rand(rows) < share
    got = boundary(lp, anomalous, beta=beta, tau=0.2, normalizer=4.0)
    normal = sorted(lp[~anomalous].tolist())
    assert int(got.n_normal) == len(normal)
    if not normal:
        assert math.isnan(got.b_n)
        return
    assert float(got.b_n) == normal[int(len(normal) * beta)] / 4.0
    assert float(got.b_a) == pytest.approx(float(got.b_n) - 0.2, abs=1e-15)
    oracle = boundary(lp, anomalous, beta=beta, tau=0.2, normalizer=4.0, impl="reference")
    assert torch.equal(got.b_n, oracle.b_n)
    assert torch.equal(got.b_a, oracle.b_a)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_no_normals_is_nan_not_a_crash(impl: str, rows: int) -> None:
    got = boundary(torch.randn(rows), torch.ones(rows, dtype=torch.bool), impl=impl)
    assert math.isnan(got.b_n)
    assert math.isnan(got.b_a)
    assert int(got.n_normal) == 0


def test_is_detached() -> None:
    lp = torch.randn(9, requires_grad=True)
    assert not boundary(lp, torch.zeros(9, dtype=torch.bool)).b_n.requires_grad


@pytest.mark.parametrize("bad", [{"beta": 1.0}, {"beta": -0.1}, {"tau": -1.0}, {"normalizer": 0.0}])
def test_bad_options(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        boundary(torch.zeros(3), torch.zeros(3, dtype=torch.bool), **bad)


def test_bad_mask() -> None:
    with pytest.raises(FeatureError, match="bool"):
        boundary(torch.zeros(3), torch.zeros(3))
    with pytest.raises(FeatureError, match=r"both be \[N\]"):
        boundary(torch.zeros(3), torch.zeros(4, dtype=torch.bool))
