"""The explicit boundary as the official code computes it, and the rows that it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from fastbgad import ops
from fastbgad.compat import bgad
from fastbgad.errors import ConfigError, FeatureError

from .official_formulas import DTYPES, chunk, exact_boundary, exact_loss


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_boundary(dtype: torch.dtype, mask_dtype: torch.dtype, on_host: bool, monkeypatch) -> None:
    if not on_host:  # the arithmetic for a GPU, which counts nothing on the host
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for rows in (1, 100, 1023):
        # With 100 normal rows, 0.29 is place 29 in float32 and 28 in float64; 0.01 is the same in both.
        for beta, share in ((0.0, 0.2), (0.01, 0.2), (0.05, 0.0), (0.29, 0.0), (0.29, 0.2), (0.999, 0.5)):
            lp, _, _ = chunk("normal", rows, dtype)
            mask = torch.arange(rows) % 100 >= 100 * (1 - share)
            found = bgad.get_logp_boundary(lp, mask.to(mask_dtype), beta, 0.3, 7)
            assert [b.dtype for b in found] == [dtype, dtype]
            assert not any(b.requires_grad for b in found)
            for mine, theirs in zip(found, exact_boundary(lp, mask.to(mask_dtype), beta, 0.3, 7), strict=True):
                assert mine == theirs


def test_default_options_are_the_official_ones() -> None:
    lp, mask, edges = chunk("mixed", 200, torch.float64)
    assert bgad.get_logp_boundary(lp, mask) == exact_boundary(lp, mask, 0.05, 0.1, 10)
    lp = lp.detach()
    wanted = [float(loss) for loss in exact_loss(lp, mask, edges, 10, None)]
    assert [float(loss) for loss in bgad.calculate_bg_spp_loss(lp, mask, edges)] == pytest.approx(wanted)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("beta", [0.05, 0.29])
@pytest.mark.parametrize("rows", [0, 300])
def test_boundary_without_a_normal_row(rows: int, beta: float, on_host: bool, monkeypatch) -> None:
    if not on_host:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    lp, mask = torch.zeros(rows, requires_grad=True), torch.ones(rows)
    edges = bgad.get_logp_boundary(lp, mask, beta)
    assert all(b.isnan() for b in edges)
    normal, anomalous = bgad.calculate_bg_spp_loss(lp, mask, edges, empty="zero")
    assert (normal, anomalous) == (0, 0)
    (normal + anomalous).backward()
    assert (lp.grad == 0).all()


def test_bad_rows() -> None:
    lp, mask, edges = torch.zeros(4), torch.zeros(4), (torch.tensor(0.0), torch.tensor(-0.1))
    calls = [
        lambda lp, mask: bgad.get_logp_boundary(lp, mask),
        lambda lp, mask: bgad.calculate_bg_spp_loss(lp, mask, edges),
        lambda lp, mask: bgad.calculate_bg_spp_loss_normal(lp, mask, edges),
    ]
    for call in calls:
        for bad in ((lp, mask[:3]), (lp, mask[:, None]), (lp[:, None], mask[:, None]), (lp, mask.to("meta"))):
            with pytest.raises(FeatureError):
                call(*bad)
    for options in ({"pos_beta": 1.0}, {"pos_beta": -0.1}, {"margin_tau": -1.0}, {"normalizer": 0}):
        with pytest.raises(ConfigError):
            bgad.get_logp_boundary(lp, mask, **options)
    with pytest.raises(FeatureError, match="1 of 4 log-likelihoods are NaN"):
        bgad.get_logp_boundary(torch.tensor([0.0, math.nan, 1.0, 2.0]), mask)
    for value in (255, 0.5, -1):
        with pytest.raises(FeatureError, match="binarize"):
            bgad.get_logp_boundary(lp, torch.tensor([0, 0, value, value]))
    with pytest.raises(FeatureError, match="weights"):
        bgad.calculate_bg_spp_loss(lp, mask, edges, weights=torch.ones(3))
    with pytest.raises(FeatureError, match="boundaries"):
        bgad.calculate_bg_spp_loss(lp, mask, edges[:1])
    with pytest.raises(FeatureError, match="boundaries"):
        bgad.calculate_bg_spp_loss(lp, mask, (torch.zeros(2), torch.zeros(2)))
    with pytest.raises(ConfigError, match="empty"):
        bgad.calculate_bg_spp_loss_normal(lp, mask, edges, empty="none")
    for weighting in (bgad.normal_fl_weighting, bgad.abnormal_fl_weighting):
        with pytest.raises(ConfigError, match="normalizer"):
            weighting(lp, normalizer=-1)
    with pytest.raises(FeatureError, match="C is 3"):
        bgad.get_logp(3, torch.zeros(5, 4), torch.zeros(5))
    with pytest.raises(FeatureError, match="latent"):
        bgad.get_logp(4, torch.zeros(5, 4), torch.zeros(4))


def test_values_are_looked_at_inside_debug_checks(monkeypatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    lp, mask = torch.tensor([0.0, math.nan]), torch.zeros(2)
    bgad.get_logp_boundary(lp, mask)
    with ops.debug_checks(), pytest.raises(FeatureError, match="NaN"):
        bgad.get_logp_boundary(lp, mask)
