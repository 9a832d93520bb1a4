"""Pixel metrics of 40 maps of 256 and of 1024 px against scikit-learn, anomalib and the official threshold loop.

    pytest benchmarks/bench_metrics.py
    pytest benchmarks/bench_metrics.py --official PATH     with your own checkout of the official code as a contender

The official evaluation takes minutes, so a part of its work is timed and multiplied; the contender's name says what
part. Only contenders that agree are timed: fastbgad with scikit-learn, the others with fastbgad. The larger maps need
4 GB of memory, most of it in scikit-learn, and take three minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from harness import Comparison, Contender, SkippedError, run
from numpy.typing import NDArray
from official import OFFICIAL, load
from scipy import ndimage
from skimage.measure import label, regionprops
from sklearn.metrics import auc, roc_auc_score, roc_curve

from fastbgad.evaluate.metrics import official_pro, pixel_metrics
from fastbgad.evaluate.regions import label_regions

N, LIMIT = 40, 0.3
STEPS = 1000  # thresholds of the official PRO
PART = 100  # one threshold of so many is timed
MAPS_PART = 10  # the official code itself cannot be told to try fewer thresholds: it gets one map of so many

FAST = "fastbgad pixel AUROC + AUPRO"
FAST_OFFICIAL = f"fastbgad official_pro, {STEPS} thresholds"
BASELINE = f"official PRO + scikit-learn AUROC, 1/{PART} of each x {PART}"
LOOP = f"official PRO, {STEPS // PART} of {STEPS} thresholds x {PART}"
SKLEARN = "scikit-learn roc_auc_score"
SKLEARN_PRO = "scikit-learn roc_curve weighted for AUPRO"
ANOMALIB = "anomalib AUPRO"
OFFICIAL_EVALUATION = f"{OFFICIAL} PRO + AUROC, {N // MAPS_PART} of {N} maps x {MAPS_PART}"

# Float64 throughout: sums of up to 4e7 weights, added up one after the other in scikit-learn's curves.
TOLERANCE = 1e-11
# The official code computes its thresholds in the float32 of the scores, fastbgad in float64 and rounds them: a few of
# the pixels between two thresholds change sides, of each region and of the normal ones.
OFFICIAL_TOLERANCE = 1e-5
# anomalib's curve is the same polygon, cut at the limit by the same interpolation, but each of its up to 1e7 points is
# rounded to float32 and their trapezoids are added up in float32.
ANOMALIB_TOLERANCE = 1e-5


class Maps(NamedTuple):
    """Anomaly maps and their ground truth."""

    maps: NDArray[np.float32]  # [N, pixels, pixels]
    masks: NDArray[np.bool_]  # [N, pixels, pixels]


# One size at a time: the maps of one comparison go when the next one makes its own.
@lru_cache(maxsize=1)
def make_maps(pixels: int) -> Maps:
    """Smooth maps, the first half of them with up to three round defects of different strength."""
    rng = np.random.default_rng(0)
    y, x = np.ogrid[:pixels, :pixels]
    maps = np.empty((N, pixels, pixels), dtype=np.float32)
    masks = np.zeros(maps.shape, dtype=bool)
    for index, (scores, mask) in enumerate(zip(maps, masks, strict=True)):
        scores[:] = ndimage.gaussian_filter(rng.standard_normal(scores.shape, dtype=np.float32), 3)
        scores /= scores.std()
        for _ in range(rng.integers(1, 4) if index < N // 2 else 0):
            centre_y, centre_x = rng.integers(pixels // 10, pixels - pixels // 10, 2)
            radius = rng.integers(pixels // 64, pixels // 10)
            defect = (y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2
            mask |= defect
            scores += rng.uniform(1, 5) * ndimage.gaussian_filter(defect.astype(np.float32), 3)
    return Maps(maps, masks)


@lru_cache(maxsize=1)
def truth(pixels: int) -> tuple[float, float]:
    """AUROC and AUPRO from scikit-learn."""
    data = make_maps(pixels)
    return sklearn_auroc(data), sklearn_aupro(data)


@lru_cache(maxsize=1)
def ours(pixels: int) -> tuple[float, float]:
    """AUROC and AUPRO from fastbgad."""
    return pixel_metrics(*make_maps(pixels), LIMIT)[:2]


def sklearn_auroc(data: Maps) -> float:
    return float(roc_auc_score(data.masks.ravel(), data.maps.ravel()))


def sklearn_aupro(data: Maps) -> float:
    """The PRO curve is a ROC curve in which each anomalous pixel weighs 1 / (regions x pixels of its region)."""
    regions = label_regions(list(data.masks))
    weights = np.ones(data.maps.shape)
    weights[data.masks] = 1 / (regions.sizes.size * regions.sizes[regions.of_pixel])
    fpr, pro, _ = roc_curve(
        data.masks.ravel(), data.maps.ravel(), sample_weight=weights.ravel(), drop_intermediate=False
    )
    end = np.interp(LIMIT, fpr, pro)
    kept = fpr < LIMIT
    return float(auc(np.append(fpr[kept], LIMIT), np.append(pro[kept], end)) / LIMIT)


def anomalib_aupro(data: Maps) -> float:
    from anomalib.metrics import AUPRO

    metric = AUPRO(fields=("maps", "masks"), fpr_limit=LIMIT)
    metric.update(SimpleNamespace(maps=torch.from_numpy(data.maps), masks=torch.from_numpy(data.masks)))
    return float(metric.compute())


def official_loop(data: Maps, steps: int, every: int = 1) -> float:
    """The official algorithm, threshold by threshold, `steps` of them or one of `every`, up to an FPR of 1.

    At each threshold it binarises all maps, finds the regions of all masks anew, takes the part of each filled region
    that was found, the false positive rate, and on the way the intersection over union of each anomalous image.
    """
    maps, masks = data
    top, bottom = float(maps.max()), float(maps.min())
    fprs, pros, ious = [], [], []
    for step in range(0, steps, every):
        found = maps > top - step * ((top - bottom) / steps)
        overlaps, unions = [], []
        for binary, mask in zip(found, masks, strict=True):
            for region in regionprops(label(mask, connectivity=2)):
                overlaps.append((binary[region.slice] & region.image_filled).sum() / region.area)
            both, either = (binary & mask).sum(), (binary | mask).sum()
            if mask.any():
                unions.append(both / either)
        pros.append(np.mean(overlaps))
        ious.append(np.mean(unions))
        normal = ~masks
        fprs.append((found & normal).sum() / normal.sum())
    assert max(ious) > 0
    fpr = np.array(fprs)
    return float(auc(fpr / fpr.max(), np.array(pros))) if fpr.max() > 0 else 0.0


def official_part(data: Maps) -> None:
    """A hundredth of the official evaluation: of the thresholds, and of the pixels for the AUROC.

    To sort fewer pixels takes less time for each, so that multiplied by a hundred the AUROC (one part in 20 of the
    whole) looks somewhat faster than it is.
    """
    official_loop(data, STEPS, PART)
    sklearn_auroc(Maps(data.maps.reshape(-1)[::PART], data.masks.reshape(-1)[::PART]))


@lru_cache(maxsize=1)
def official_loop_error(pixels: int) -> float:
    """Return the difference of the loop and `fastbgad.official_pro`, both with as many thresholds as are timed."""
    data, steps = make_maps(pixels), STEPS // PART
    return abs(official_loop(data, steps) - official_pro(*data, limit=1.0, steps=steps))


def largest(*differences: float) -> float:
    """NaN where one of them is NaN, which `max` may hide."""
    return float(np.max(np.abs(differences)))


def fast(pixels: int) -> Contender:
    def error() -> float:
        auroc, aupro = truth(pixels)
        return largest(ours(pixels)[0] - auroc, ours(pixels)[1] - aupro)

    return Contender(lambda: pixel_metrics(*make_maps(pixels), LIMIT), error, TOLERANCE)


def fast_official(pixels: int) -> Contender:
    call = partial(official_pro, *make_maps(pixels), LIMIT, STEPS)
    return Contender(call, partial(official_loop_error, pixels), TOLERANCE)


def loop(call: Callable[[Maps], object], pixels: int) -> Contender:
    return Contender(partial(call, make_maps(pixels)), partial(official_loop_error, pixels), TOLERANCE, scale=PART)


def sklearn_alone(call: Callable[[Maps], float], index: int, pixels: int) -> Contender:
    return Contender(
        partial(call, make_maps(pixels)), lambda: largest(truth(pixels)[index] - ours(pixels)[index]), TOLERANCE
    )


def anomalib(pixels: int) -> Contender:
    try:
        import anomalib.metrics  # noqa: F401
    except ImportError as problem:
        raise SkippedError(f"anomalib cannot be imported: {problem}") from problem
    call = partial(anomalib_aupro, make_maps(pixels))
    return Contender(call, lambda: largest(call() - ours(pixels)[1]), ANOMALIB_TOLERANCE)


def official_evaluation(path: str, pixels: int) -> Contender:
    """The official PRO and the AUROC that is reported beside it, of a few maps: the time is linear in the maps."""
    code = load(path)
    some = Maps(*(array[::MAPS_PART] for array in make_maps(pixels)))

    def call() -> float:
        sklearn_auroc(some)
        return float(code.pro(some.maps, some.masks))

    def error() -> float:
        return largest(call() - official_pro(*some, LIMIT, STEPS))

    return Contender(call, error, OFFICIAL_TOLERANCE, scale=MAPS_PART)


def comparisons() -> list[Comparison]:
    return [
        Comparison(
            f"pixel AUROC and AUPRO, {N} maps of {pixels} px",
            baseline=BASELINE,
            contenders={
                BASELINE: partial(loop, official_part, pixels),
                LOOP: partial(loop, partial(official_loop, steps=STEPS, every=PART), pixels),
                SKLEARN: partial(sklearn_alone, sklearn_auroc, 0, pixels),
                SKLEARN_PRO: partial(sklearn_alone, sklearn_aupro, 1, pixels),
                ANOMALIB: partial(anomalib, pixels),
                FAST_OFFICIAL: partial(fast_official, pixels),
                FAST: partial(fast, pixels),
            },
            ours=(FAST,),
            sizes={"pixels": pixels, "maps": N},
            images=N,
            # One call of each but fastbgad takes up to half a minute at 1024 px; the checks have warmed up what they
            # need. Peak memory is not measured: a part of the work would show a part of the memory.
            rounds=5 if pixels < 1024 else 1,
            warmup=1 if pixels < 1024 else 0,
            track=pixels < 1024,
        )
        for pixels in (256, 1024)
    ]


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda comparison: comparison.name)
def test_pixel_metrics(comparison: Comparison, official: str | None, benchmark, capsys) -> None:
    if official is not None:
        pixels = comparison.sizes["pixels"]
        comparison.contenders[OFFICIAL_EVALUATION] = partial(official_evaluation, official, pixels)
    run(comparison, benchmark, capsys)
