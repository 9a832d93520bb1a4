"""The official code's anomaly maps and PRO metric."""

from __future__ import annotations

import copy
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastbgad.compat import bgad
from fastbgad.compat.bgad import scores as scores_module
from fastbgad.errors import ConfigError, FeatureError, MetricError

from .official_formulas import ARGS, DTYPES


def exact_scores(levels: list[list[Tensor]], size: tuple[int, int]) -> np.ndarray:
    summed = 0
    for parts in levels:
        lp = torch.cat(parts)
        likelihood = torch.exp(lp - lp.max())[:, None]
        summed = summed + interpolate(likelihood, size=size, mode="bilinear", align_corners=True)[:, 0].numpy()
    return summed.max() - summed


def batches(counts: list[int], dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    sides = ((8, 6), (4, 3), (1, 1))
    return [[torch.randn(n, h, w, generator=generator).to(dtype) - 2 for n in counts] for h, w in sides]


@pytest.mark.parametrize("counts", [[1], [3, 2], [1, 1, 4]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_anomaly_scores(dtype: torch.dtype, counts: list[int], monkeypatch) -> None:
    levels = batches(counts, dtype)
    before = copy.deepcopy(levels)
    for pixels in (scores_module._PIXELS_AT_ONCE, 2 * 17 * 12):  # all images at once, and two at a time
        monkeypatch.setattr(scores_module, "_PIXELS_AT_ONCE", pixels)
        scores = bgad.convert_to_anomaly_scores(ARGS, levels)
        wanted = exact_scores(levels, (17, 12))
        assert scores.shape == (sum(counts), 17, 12)
        assert scores.dtype == wanted.dtype
        assert np.abs(scores - wanted).max() < 8 * torch.finfo(dtype).eps
        assert scores.min() == 0
    assert all(torch.equal(a, b) for x, y in zip(levels, before, strict=True) for a, b in zip(x, y, strict=True))


def test_anomaly_scores_of_some_levels_in_a_square() -> None:
    args, levels = Namespace(feature_levels=2, img_size=9), batches([2, 1])
    levels[0][0].requires_grad_()
    scores = bgad.convert_to_anomaly_scores(args, levels)
    assert np.abs(scores - exact_scores([[lp.detach() for lp in parts] for parts in levels[:2]], (9, 9))).max() < 1e-6


def test_bad_scores() -> None:
    good = batches([2])
    nan, infinite = copy.deepcopy(good), copy.deepcopy(good)
    nan[1][0][0, 0, 0] = math.nan
    infinite[2][0][:] = -math.inf
    for levels, words in (
        (good[:2], "feature_levels"),
        (nan, "level 1 is nan"),
        (infinite, "level 2 is -inf"),
        ([[], *good[1:]], "no log-likelihoods"),
        ([good[0], good[1], batches([3])[2]], "same images"),
        ([[torch.zeros(2, 3)], *good[1:]], "b, h, w"),
        ([[torch.zeros(2, 3, 3), torch.zeros(2, 4, 3)], *good[1:]], "b, h, w"),
        ([[lp.double() for lp in good[0]], *good[1:]], "one type"),
    ):
        with pytest.raises(FeatureError, match=words):
            bgad.convert_to_anomaly_scores(ARGS, levels)
    with pytest.raises(ConfigError, match="img_size"):
        bgad.convert_to_anomaly_scores(Namespace(feature_levels=3, img_size=(0, 4)), good)
    with pytest.raises(ConfigError, match="feature_levels"):
        bgad.convert_to_anomaly_scores(Namespace(img_size=4), good)


def test_pro_of_thresholds() -> None:
    """One region of three pixels, of which the score finds two above every normal pixel, and the third last."""
    mask = np.zeros((2, 6, 6), dtype=bool)
    mask[0, 2, 1:4] = True
    scores = np.linspace(0.1, 0.4, 72).reshape(2, 6, 6)
    scores[0, 2, 1:4] = 1.0, 0.9, 0.0
    assert bgad.calculate_pro_metric(scores, mask) == pytest.approx(2 / 3)
    assert bgad.calculate_pro_metric(torch.from_numpy(scores), mask.astype(np.uint8)) == pytest.approx(2 / 3)
    with pytest.raises(MetricError):
        bgad.calculate_pro_metric(scores, np.zeros_like(mask))


def test_to_numpy() -> None:
    assert bgad.t2np(None) is None
    assert bgad.t2np(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
