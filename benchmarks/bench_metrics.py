"""Pixel metrics of 40 maps of 256 x 256 against scikit-learn and the official threshold loop.

    pytest benchmarks/bench_metrics.py

Contenders are timed in turn in one run, after their results were found equal; otherwise nothing is reported.
"""

from __future__ import annotations

import numpy as np
import pytest
from interleave import interleaved, medians, ratio_table, ratios
from scipy import ndimage
from sklearn.metrics import auc, roc_auc_score, roc_curve

from fastbgad.metrics import official_pro, pixel_metrics
from fastbgad.regions import filled_regions, label_regions

N, SIZE, LIMIT = 40, 256, 0.3
LOOP_STEPS = 10

FAST = "fastbgad pixel AUROC + AUPRO"
SKLEARN = "scikit-learn roc_auc_score"
SKLEARN_PRO = "scikit-learn roc_curve weighted for AUPRO"
OFFICIAL = "fastbgad official_pro, 1000 thresholds"
LOOP = f"official PRO loop, {LOOP_STEPS} of 1000 thresholds"


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray]:
    """Smooth float32 maps [40, 256, 256], half of them with up to three round defects of different strength."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    maps = ndimage.gaussian_filter(rng.normal(size=(N, SIZE, SIZE)), (0, 3, 3))
    maps /= maps.std()
    masks = np.zeros(maps.shape, dtype=bool)
    for index in range(N // 2):
        for _ in range(rng.integers(1, 4)):
            (centre_y, centre_x), radius = rng.integers(25, SIZE - 25, 2), rng.integers(4, 25)
            defect = (y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2
            masks[index] |= defect
            maps[index] += rng.uniform(1, 5) * ndimage.gaussian_filter(defect.astype(float), 3)
    return maps.astype(np.float32), masks


def sklearn_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """The PRO curve is a ROC curve in which each anomalous pixel weighs 1 / (regions x pixels of its region)."""
    regions = label_regions(list(masks))
    weights = np.ones(maps.shape)
    weights[masks] = 1 / (regions.sizes.size * regions.sizes[regions.of_pixel])
    fpr, pro, _ = roc_curve(masks.ravel(), maps.ravel(), sample_weight=weights.ravel(), drop_intermediate=False)
    end = np.interp(LIMIT, fpr, pro)
    kept = fpr < LIMIT
    return auc(np.append(fpr[kept], LIMIT), np.append(pro[kept], end)) / LIMIT


def official_loop(maps: np.ndarray, masks: np.ndarray, steps: int, run: int) -> float:
    """The official algorithm threshold by threshold, `run` of `steps` of them; regions are found anew at each."""
    top, bottom = float(maps.max()), float(maps.min())
    fprs, pros = [], []
    for step in range(run):
        found = maps > top - step * ((top - bottom) / steps)
        overlaps = [(found[r.image][r.box] & r.filled).sum() / r.size for r in filled_regions(list(masks))]
        pros.append(np.mean(overlaps))
        fprs.append((found & ~masks).sum() / (~masks).sum())
    fpr, pro = np.array(fprs), np.array(pros)
    return auc(fpr / fpr.max(), pro) if fpr.max() > 0 else 0.0


def require_equal(name: str, ours: float, theirs: float, tolerance: float) -> None:
    if abs(ours - theirs) > tolerance:
        pytest.fail(f"{name}: {ours!r} differs from {theirs!r}; nothing is timed")


def test_pixel_metrics(case, benchmark, capsys):
    maps, masks = case
    ours = pixel_metrics(maps, masks, LIMIT)
    require_equal("pixel AUROC", ours.auroc, roc_auc_score(masks.ravel(), maps.ravel()), 1e-12)
    require_equal("AUPRO", ours.aupro, sklearn_aupro(maps, masks), 1e-9)
    loop = official_loop(maps, masks, LOOP_STEPS, LOOP_STEPS)
    require_equal("official PRO", official_pro(maps, masks, limit=1.0, steps=LOOP_STEPS), loop, 1e-12)

    times = interleaved(
        {
            FAST: lambda: pixel_metrics(maps, masks, LIMIT),
            SKLEARN: lambda: roc_auc_score(masks.ravel(), maps.ravel()),
            SKLEARN_PRO: lambda: sklearn_aupro(maps, masks),
            OFFICIAL: lambda: official_pro(maps, masks, LIMIT),
            LOOP: lambda: official_loop(maps, masks, 1000, LOOP_STEPS),
        }
    )
    speed = ratios(times, FAST)
    benchmark.extra_info["median_s"] = medians(times)
    benchmark.extra_info["times_slower"] = {name: 1 / value for name, value in speed.items()}
    with capsys.disabled():
        print(f"\n{N} maps of {SIZE} x {SIZE}, {masks.mean():.1%} anomalous; AUROC {ours.auroc:.4f}, ", end="")
        print(f"AUPRO {ours.aupro:.4f}, {ours.n_regions} regions\n{ratio_table(times, SKLEARN)}")
        print(f"the whole official loop takes about {1000 // LOOP_STEPS} times what its row says")
    benchmark.pedantic(pixel_metrics, args=(maps, masks, LIMIT), rounds=5, warmup_rounds=1)
