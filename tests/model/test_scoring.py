"""Calibration and decisions: constants of the model, not of the images that happen to be scored together."""

from __future__ import annotations

import pytest
import torch

from fastbgad import reference
from fastbgad.model.scoring import calibrate, level_weights, map_thresholds, official_anomaly_maps, patch_sides, sides

SIZE = (32, 48)


@pytest.fixture
def levels() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, h, w, generator=generator, dtype=torch.float64) - 2 for h, w in ((16, 24), (8, 12))]


def test_calibration_by_hand(levels) -> None:
    calibration = calibrate(levels, SIZE, beta=0.05, tau=0.1, normalizer=10.0)
    for level, lp in enumerate(levels):
        ordered = torch.sort(lp.reshape(-1)).values
        b_n = ordered[int(len(ordered) * 0.05)] / 10
        assert calibration.level_max[level] == ordered[-1]
        assert calibration.boundaries[level, 0] == b_n
        assert calibration.boundaries[level, 1] == pytest.approx(float(b_n) - 0.1)
    maps = reference.score_map(levels, SIZE, calibration.level_max, calibration.offset)
    assert float(maps.min()) == pytest.approx(0, abs=1e-12)  # the most normal training pixel scores 0


def test_thresholds_are_the_scores_of_patches_on_the_boundary(levels) -> None:
    calibration = calibrate(levels, SIZE, beta=0.05, tau=0.1, normalizer=10.0)
    for side in (0, 1):
        on_it = [torch.full_like(lp, 10 * float(calibration.boundaries[i, side])) for i, lp in enumerate(levels)]
        score = reference.score_map(on_it, SIZE, calibration.level_max, calibration.offset)
        assert torch.allclose(score, map_thresholds(calibration, 10.0)[side])


def test_weighted_levels_by_hand(levels) -> None:
    weights = level_weights("channels", (24, 40, 112))
    assert sum(weights) == pytest.approx(3)
    assert weights == pytest.approx([3 * 24 / 176, 3 * 40 / 176, 3 * 112 / 176])
    assert level_weights("equal", (24, 40)) == [1, 1]
    calibration = calibrate(levels, SIZE, beta=0.05, tau=0.1, normalizer=10.0, weights=[0.5, 1.5])
    maps = [reference.upsample_bilinear(torch.exp(lp - lp.max()), SIZE) for lp in levels]
    weighted = 0.5 * maps[0] + 1.5 * maps[1]
    assert float(calibration.offset) == pytest.approx(float(weighted.max()))
    found = reference.score_map(levels, SIZE, calibration.level_max, calibration.offset)
    assert torch.allclose(found, weighted.max() - weighted)
    on_it = [torch.full_like(lp, 10 * float(calibration.boundaries[i, 1])) for i, lp in enumerate(levels)]
    score = reference.score_map(on_it, SIZE, calibration.level_max, calibration.offset)
    assert torch.allclose(score, map_thresholds(calibration, 10.0)[1])


def test_sides(levels) -> None:
    assert sides(torch.tensor([0.1, 0.5, 0.6, 0.9, 1.0]), 0.5, 0.9).tolist() == [0, 0, 1, 1, 2]
    boundaries = torch.tensor([[-0.2, -0.3], [-0.1, -0.15]], dtype=torch.float64)
    for lp, side, (b_n, b_a) in zip(levels, patch_sides(levels, boundaries, 10.0), boundaries, strict=True):
        u = lp / 10
        assert torch.equal(side == 0, u >= b_n)
        assert torch.equal(side == 2, u < b_a)
        assert side.dtype == torch.uint8


def test_official_calibration_depends_on_the_set(levels) -> None:
    """As the official code: the same images score otherwise beside a more normal one."""
    alone = official_anomaly_maps([lp[:3] for lp in levels], SIZE)
    beside = official_anomaly_maps([torch.cat([lp[:3], lp[3:] + 1]) for lp in levels], SIZE)[:3]
    assert float(alone.min()) == 0
    assert not torch.allclose(alone, beside)
    exact = [lp - lp.max() for lp in levels]
    total = sum(reference.upsample_bilinear(torch.exp(lp), SIZE) for lp in exact)
    assert torch.allclose(official_anomaly_maps(levels, SIZE), total.max() - total, atol=1e-12)
