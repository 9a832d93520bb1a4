"""Metrics against plain loops in exact fractions, scikit-learn, and the official algorithm spelled out."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.metrics import auc, roc_auc_score

from fastbgad.errors import MetricError
from fastbgad.evaluate import metrics
from fastbgad.evaluate.metrics import (
    Metrics,
    PixelMetrics,
    aupro,
    auroc,
    evaluate,
    measure,
    official_pro,
    pixel_metrics,
)
from fastbgad.evaluate.regions import filled_regions, label_regions

LIMITS = (0.05, 0.3, 1.0)


def grow_regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """The 8-connected regions of one mask by flood fill."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        border, region = [left.pop()], []
        while border:
            y, x = border.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            border += near
        regions.append(region)
    return regions


def curve_by_loops(maps, masks) -> tuple[list[Fraction], list[Fraction], list[Fraction]]:
    """FPR, TPR and PRO at every distinct threshold, by counting afresh at each."""
    normal = [float(s) for scores, mask in zip(maps, masks, strict=True) for s in scores[~mask]]
    regions = [
        [float(scores[y, x]) for y, x in region]
        for scores, mask in zip(maps, masks, strict=True)
        for region in grow_regions(mask)
    ]
    anomalous = [s for region in regions for s in region]
    fpr, tpr, pro = [Fraction(0)], [Fraction(0)], [Fraction(0)]
    for threshold in sorted({*normal, *anomalous}, reverse=True):
        fpr.append(Fraction(sum(s >= threshold for s in normal), len(normal)))
        tpr.append(Fraction(sum(s >= threshold for s in anomalous), len(anomalous)))
        overlaps = [Fraction(sum(s >= threshold for s in region), len(region)) for region in regions]
        pro.append(sum(overlaps, Fraction(0)) / len(overlaps))
    return fpr, tpr, pro


def area_up_to(limit: float, x: list[Fraction], y: list[Fraction]) -> float:
    """The exact trapezoidal area of a polygon for abscissae in [0, limit], divided by limit."""
    end, total = Fraction(limit), Fraction(0)
    for x0, x1, y0, y1 in zip(x, x[1:], y, y[1:], strict=False):
        if x0 >= end or x0 == x1:
            continue
        stop = min(x1, end)
        y_stop = y0 + (y1 - y0) * (stop - x0) / (x1 - x0)
        total += (stop - x0) * (y0 + y_stop) / 2
    return float(total / end)


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Small maps with 2 to 40 score levels and masks of many touching, diagonal and ring-like regions."""
    rng = np.random.default_rng(seed)
    n, height, width = rng.integers(1, 4), rng.integers(3, 9), rng.integers(3, 9)
    masks = rng.random((n, height, width)) < rng.choice([0.1, 0.3, 0.6])
    masks.flat[0], masks.flat[-1] = True, False
    levels = rng.integers(2, 41)
    maps = np.round(rng.random(masks.shape) * levels) / 7 + masks * rng.choice([0.0, 0.5, 1.0])
    return maps.astype(rng.choice([np.float32, np.float64])), masks


@pytest.mark.parametrize("seed", range(60))
def test_areas_equal_the_integrated_curves(seed):
    maps, masks = random_case(seed)
    fpr, tpr, pro = curve_by_loops(maps, masks)
    for limit in LIMITS:
        result = pixel_metrics(maps, masks, limit)
        assert result.auroc == pytest.approx(area_up_to(1.0, fpr, tpr), abs=1e-12)
        assert result.aupro == pytest.approx(area_up_to(limit, fpr, pro), abs=1e-12)
        assert result.n_regions == sum(len(grow_regions(mask)) for mask in masks)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_limit_inside_a_tie_is_interpolated(levels):
    # With so few levels every limit cuts a diagonal piece of the curve.
    maps, masks = random_case(7)
    maps = np.floor(maps / maps.max() * levels)
    fpr, _, pro = curve_by_loops(maps, masks)
    for limit in (0.001, 0.123, 0.77):
        assert aupro(maps, masks, limit) == pytest.approx(area_up_to(limit, fpr, pro), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_auroc_equals_scikit_learn(dtype, decimals):
    rng = np.random.default_rng(decimals)
    labels = rng.random((30, 41)) < 0.2
    scores = np.round(10 * (rng.normal(size=labels.shape) + labels), decimals).astype(dtype)
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels.ravel(), scores.ravel()), abs=1e-12)


def test_known_values_by_hand():
    # One region of one pixel that ties with one of four normals, one normal above: FPR runs 1/4 to 2/4 on a ramp.
    maps = np.array([[3.0, 2.0, 2.0, 1.0, 0.0]])
    masks = np.array([[False, True, False, False, False]])
    assert auroc(maps, masks) == 2.5 / 4
    assert pixel_metrics(maps[None], masks[None], 1.0) == PixelMetrics(2.5 / 4, 2.5 / 4, 1)
    # Up to 3/8 the ramp has risen to a half: a triangle of base 1/8 and height 1/2.
    assert aupro(maps[None], masks[None], 3 / 8) == pytest.approx((1 / 8 * 1 / 2 / 2) / (3 / 8), abs=1e-15)
    assert aupro(maps[None], masks[None], 1 / 4) == 0.0


def test_a_region_counts_once_whatever_its_size():
    maps, masks = np.zeros((1, 8, 8)), np.zeros((1, 8, 8), dtype=bool)
    masks[0, 0:5, 0:5] = masks[0, 7, 7] = True
    maps[0, 7, 7] = 1.0
    maps[0, 0:5, 0:5] = -1.0
    assert pixel_metrics(maps, masks, 0.3) == PixelMetrics(1 / 26, 0.5, 2)


def test_diagonal_neighbours_are_one_region():
    mask = np.zeros((4, 6), dtype=bool)
    mask[0, 0] = mask[1, 1] = mask[3, 3] = mask[2, 5] = True
    regions = label_regions([mask, ~mask])
    assert regions.sizes.tolist() == [2, 1, 1, 20]
    assert regions.of_pixel[:4].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_only_the_order_of_scores_matters(seed):
    maps, masks = random_case(seed)
    maps = np.round(maps.astype(np.float64) * 14)  # levels far enough apart to stay distinct
    expected = pixel_metrics(maps, masks)
    for transform in (np.arctan, np.cbrt, lambda s: 5 * s - 3, lambda s: -1 / (1 + s)):
        assert pixel_metrics(transform(maps), masks) == expected
    # Turning the order round swaps the classes' fortunes.
    assert auroc(-maps, masks) == pytest.approx(1 - expected.auroc, abs=1e-15)


@pytest.mark.parametrize("seed", range(10))
def test_order_of_images_does_not_matter(seed):
    maps, masks = random_case(100 + seed)
    order = np.random.default_rng(seed).permutation(len(maps))
    assert pixel_metrics(maps[order], masks[order]) == pytest.approx(pixel_metrics(maps, masks), abs=1e-15)


def test_many_threads_give_the_same_counts(monkeypatch):
    maps, masks = random_case(3)
    expected = pixel_metrics(maps, masks)
    monkeypatch.setattr(metrics, "_SCORES_PER_THREAD", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert pixel_metrics(maps, masks) == expected


def test_counts_beyond_two_to_the_24():
    # Float32 sums of ones stop growing at 2^24: the result would be 1 instead of (n + 1) / (n + 2).
    n = 2**24
    scores = np.zeros(n + 3, dtype=np.float32)
    scores[-2:] = 2.0, 1.0
    labels = np.zeros(n + 3, dtype=bool)
    labels[-1] = True
    assert auroc(scores, labels) == (n + 1) / (n + 2) < 1.0


def test_every_kind_of_array_gives_the_same_result():
    maps, masks = random_case(11)
    maps = np.round(maps * 7).astype(np.float32)  # small integers: exact in every dtype
    expected = pixel_metrics(maps, masks)
    for dtype in (np.float16, np.float64, np.uint8):
        assert pixel_metrics(maps.astype(dtype), masks) == expected
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert pixel_metrics(torch.from_numpy(maps).to(dtype), torch.from_numpy(masks)) == expected
    assert pixel_metrics(list(torch.from_numpy(maps).requires_grad_()), masks.astype(np.uint8) * 255) == expected
    assert pixel_metrics(maps[:, ::-1, ::-1], masks[:, ::-1, ::-1]) == pytest.approx(expected, abs=1e-15)


def test_maps_of_different_sizes():
    small, large = random_case(12), random_case(13)
    maps, masks = [*small[0], *large[0]], [*small[1], *large[1]]
    fpr, tpr, pro = curve_by_loops(maps, masks)
    result = pixel_metrics(maps, masks)
    assert maps[0].shape != maps[-1].shape
    assert result.auroc == pytest.approx(area_up_to(1.0, fpr, tpr), abs=1e-12)
    assert result.aupro == pytest.approx(area_up_to(0.3, fpr, pro), abs=1e-12)


def test_input_is_left_alone():
    maps, masks = random_case(14)
    before = maps.copy()
    pixel_metrics(maps, masks)
    official_pro(maps, masks)
    np.testing.assert_array_equal(maps, before)


def test_evaluate_reports_everything():
    maps, masks = random_case(15)
    maps, masks = np.concatenate([maps, maps / 2]), np.concatenate([masks, np.zeros_like(masks)])
    labels = masks.any(axis=(1, 2)).astype(int)
    scores = maps.max(axis=(1, 2))
    pixel = pixel_metrics(maps, masks, 0.2)
    expected = Metrics(
        auroc(scores, labels), pixel.auroc, pixel.aupro, 0.2, len(maps), int(labels.sum()), pixel.n_regions
    )
    assert evaluate(maps, masks, scores, labels, pro_limit=0.2) == expected


def test_what_can_be_measured_is():
    maps, masks = random_case(15)
    maps, masks = np.concatenate([maps, maps / 2]), np.concatenate([masks, np.zeros_like(masks)])
    labels, scores = masks.any(axis=(1, 2)).astype(int), maps.max(axis=(1, 2))
    whole = evaluate(maps, masks, scores, labels, 0.2)
    assert measure(maps, masks, scores, labels, 0.2) == whole

    def nan_in(metrics: Metrics) -> list[str]:
        return [name for name, value in metrics._asdict().items() if np.isnan(value)]

    unknown = labels * np.arange(len(labels)) > np.median(np.flatnonzero(labels))
    truth = ~unknown
    part = measure(maps, masks & truth[:, None, None], scores, labels, 0.2, has_truth=truth)
    assert 0 < unknown.sum() < labels.sum()
    pixel = pixel_metrics(maps[truth], masks[truth], 0.2)
    assert part == whole._replace(pixel_auroc=pixel.auroc, aupro=pixel.aupro, n_regions=pixel.n_regions)
    none = measure(maps, masks & False, scores, labels, 0.2, has_truth=labels == 0)
    assert nan_in(none) == ["pixel_auroc", "aupro"]
    assert (none.image_auroc, none.n_anomalous, none.n_regions) == (whole.image_auroc, whole.n_anomalous, 0)
    bad, good = labels == 1, labels == 0
    anomalous = measure(maps[bad], masks[bad], scores[bad], labels[bad], 0.2)
    assert nan_in(anomalous) == ["image_auroc"]
    assert anomalous.aupro == pixel_metrics(maps[bad], masks[bad], 0.2).aupro
    normal = measure(maps[good], masks[good], scores[good], labels[good], 0.2)
    assert nan_in(normal) == ["image_auroc", "pixel_auroc", "aupro"]
    assert (normal.n_images, normal.n_anomalous) == (good.sum(), 0)
    full = measure(maps[bad], masks[bad] | True, scores[bad], labels[bad])
    assert nan_in(full) == ["image_auroc", "pixel_auroc", "aupro"]
    assert full.n_regions == bad.sum()


def official_by_loops(maps, masks, limit: float, steps: int) -> float:
    """The official PRO with a fresh count at each threshold."""
    filled = list(filled_regions(masks))
    fprs, pros = [], []
    for step in range(steps):
        threshold = float(maps.max()) - step * ((float(maps.max()) - float(maps.min())) / steps)
        found = maps > threshold
        fprs.append(found[~masks].sum() / (~masks).sum())
        pros.append(np.mean([(found[r.image][r.box] & r.filled).sum() / r.size for r in filled]))
    fprs, pros = np.array(fprs), np.array(pros)
    kept = fprs <= limit
    fprs, pros = fprs[kept], pros[kept]
    return auc((fprs - fprs.min()) / (fprs.max() - fprs.min()), pros)


@pytest.mark.parametrize("seed", range(20))
def test_official_pro_follows_its_algorithm(seed):
    maps, masks = random_case(200 + seed)
    limit, steps = [(0.3, 50), (0.6, 17), (1.0, 100)][seed % 3]
    expected = official_by_loops(maps, masks, limit, steps)
    assert official_pro(maps, masks, limit, steps) == pytest.approx(expected, abs=1e-12)


def test_filled_regions_agree_with_scikit_image():
    measure = pytest.importorskip("skimage.measure")
    masks = np.random.default_rng(0).random((6, 24, 24)) < 0.45
    ours = list(filled_regions(masks))
    theirs = [(i, p) for i, mask in enumerate(masks) for p in measure.regionprops(measure.label(mask, connectivity=2))]
    assert len(ours) == len(theirs)
    assert any(region.filled.sum() > region.size for region in ours)
    for region, (image, prop) in zip(ours, theirs, strict=True):
        assert (region.image, region.box, region.size) == (image, prop.slice, prop.area)
        np.testing.assert_array_equal(region.filled, prop.image_filled)


def test_official_pro_approaches_the_exact_one_without_holes():
    rng = np.random.default_rng(5)
    masks = np.zeros((4, 48, 48), dtype=bool)
    masks[0, 5:15, 5:15] = masks[1, 20:40, 30:33] = True
    maps = rng.normal(size=masks.shape) + 1.5 * masks
    assert official_pro(maps, masks, steps=20_000) == pytest.approx(aupro(maps, masks), abs=2e-3)


MAPS = np.arange(24.0).reshape(2, 3, 4)
MASKS = MAPS > 20


def with_value(value: float) -> np.ndarray:
    maps = MAPS.copy()
    maps[1, 0, 0] = value
    return maps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pixel_metrics(with_value(np.nan), MASKS), r"map 1: 1 of 12 values are NaN or Inf"),
        (lambda: official_pro(with_value(np.inf), MASKS), r"map 1: 1 of 12 values are NaN or Inf"),
        (lambda: auroc([1.0, -np.inf], [0, 1]), r"the scores: 1 of 2 values are NaN or Inf"),
        (lambda: auroc([1.0, 2.0], [1, 1]), "there is no normal score"),
        (lambda: auroc([1.0, 2.0], [0, 0]), "there is no anomalous score"),
        (lambda: auroc([], []), "there is no anomalous score"),
        (lambda: auroc([1.0, 2.0], [0, 1, 1]), r"differ in shape: \(2,\) and \(3,\)"),
        (lambda: auroc([1.0, 2.0, 3.0], [0, 1, 2]), "the labels: values other than 0"),
        (lambda: auroc([1.0, 2.0], [-1, 0]), "the labels: values other than 0"),
        (lambda: auroc([1.0, 2.0], [0.0, np.nan]), "the labels: values other than 0"),
        (lambda: auroc(["a", "b"], [0, 1]), "real numbers"),
        (lambda: auroc([[1.0], [2.0, 3.0]], [0, 1]), "arrays of numbers"),
        (lambda: pixel_metrics(MAPS, MASKS[:1]), "2 maps but 1 masks"),
        (lambda: pixel_metrics([], []), "no maps were given"),
        (lambda: pixel_metrics(MAPS, [MASKS[0], MASKS[1].T]), r"map 1 and mask 1 differ in shape: \(3, 4\) and \(4, 3"),
        (lambda: pixel_metrics(MAPS[0], MASKS[0]), r"map 0 has the shape \(4,\)"),
        (lambda: pixel_metrics(MAPS, MASKS * np.arange(4)), "mask 1: values other than 0"),
        (lambda: pixel_metrics(MAPS, MASKS & False), "there is no anomalous pixel"),
        (lambda: pixel_metrics(MAPS, MASKS | True), "there is no normal pixel"),
        (lambda: official_pro(MAPS, MASKS & False), "there is no anomalous pixel"),
        (lambda: official_pro(MAPS, MASKS | True), "there is no normal pixel"),
        (lambda: official_pro(MAPS * 0, MASKS), "official PRO is not defined"),
        (lambda: official_pro(MAPS, MASKS, steps=1), "steps is 1"),
        (lambda: aupro(MAPS, MASKS, 0.0), r"limit is 0.0; it must lie in \(0, 1\]"),
        (lambda: aupro(MAPS, MASKS, 1.5), r"limit is 1.5"),
        (lambda: aupro(MAPS, MASKS, float("nan")), r"limit is nan"),
        (lambda: evaluate(MAPS, MASKS, [1.0, 2.0, 3.0], [0, 1, 1]), "2 maps but image scores of shape"),
        (lambda: evaluate(MAPS, MASKS, [1.0, 2.0], [1, 0]), "image 1 is labeled normal but its mask"),
        (lambda: evaluate(MAPS, MASKS, [1.0, 2.0], [1, 1]), "there is no normal image"),
        (lambda: measure(with_value(np.nan), MASKS, [1.0, 2.0], [0, 1]), "map 1: 1 of 12 values are NaN or Inf"),
        (lambda: measure(MAPS, MASKS, [1.0, 2.0], [0, 1], has_truth=[True]), r"2 maps but has_truth of shape \(1,\)"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(MetricError, match=message):
        call()
