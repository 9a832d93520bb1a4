"""Exact AUROC and AUPRO from one sort of the normal scores, and the official approximation of the latter.

Both areas depend on a score only through its rank, so no curve is ever built. Let M be the number of normal pixels,
and for an anomalous pixel with score s

    above = number of normal scores >  s
    equal = number of normal scores == s

While the threshold falls past s, the false positive rate (FPR) moves from above/M to (above + equal)/M and this pixel
turns from missed to found. Points of a curve over all distinct thresholds are joined by straight lines (the trapezoid
rule, which for the AUROC is the Mann-Whitney statistic with half credit for ties). So the pixel's own curve is 0, then
a ramp of width equal/M (a step where nothing ties), then 1, and its area up to FPR = limit is, with both
x = max(limit M - above, 0) and r = min(x, equal) counted in normal pixels,

    area = (x - r + r^2 / (2 equal)) / M        (0 <= r <= equal: the limit may cut the ramp)

The per-region overlap PRO(FPR) is the mean over regions of the mean over their pixels of these curves, and the integral
is linear, hence AUPRO = mean over regions of mean over pixels of area / limit. That is exact, ties and a limit inside a
tie included: the same polygon, integrated pixel by pixel instead of threshold by threshold. (AUPRO: Bergmann et al.,
MVTec AD, IJCV 2021.)

Counts are int64: float32 cannot count past 2^24 pixels. Memory beyond the input: one copy of the scores (two where they
come as float16, bfloat16 or integers) plus about 50 bytes, and 16 per thread, for each anomalous pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import MetricError
from .regions import Mask, filled_regions, label_regions

Array = NDArray[Any]
ArrayLike = np.ndarray | torch.Tensor | Sequence[Any]
"""A numpy array or a torch tensor on any device; nested lists work too."""

# Below so many normal scores each, threads cost more than they save; each also needs its own counts.
_SCORES_PER_THREAD = 100_000
_MOST_THREADS = 8


class PixelMetrics(NamedTuple):
    """Pixel-level metrics, each in [0, 1], and the number of 8-connected anomalous regions behind the AUPRO."""

    auroc: float
    aupro: float
    n_regions: int


class Metrics(NamedTuple):
    """All metrics of one test set; `pro_limit` is the largest FPR that `aupro` integrates to.

    NaN stands for what the test set does not define; see `measure`.
    """

    image_auroc: float
    pixel_auroc: float
    aupro: float
    pro_limit: float
    n_images: int
    n_anomalous: int
    n_regions: int


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the area under the ROC curve: P(anomalous > normal) + P(anomalous == normal) / 2, exact.

    Args:
        scores: any shape, any float or integer dtype; higher means more anomalous.
        labels: same shape, bool or two-valued with 0 for normal.

    Raises:
        MetricError: NaN or Inf scores, shapes that differ, labels that are not two-valued, or one class only.
    """
    values, positive = _checked_pair(scores, labels, "the scores", "the labels")
    ranks = _rank(values[~positive], values[positive], "score")
    return ranks.auroc()


def aupro(maps: ArrayLike, masks: ArrayLike, limit: float = 0.3) -> float:
    """Return the normalized area under the per-region overlap curve for FPR in [0, limit], exact.

    Args:
        maps: anomaly maps [N, H, W], or a sequence of [H_i, W_i]; higher means more anomalous.
        masks: ground truth of the same shapes, bool or two-valued with 0 for normal.
        limit: largest false positive rate, in (0, 1].

    Raises:
        MetricError: as `pixel_metrics`.
    """
    return pixel_metrics(maps, masks, limit).aupro


def pixel_metrics(maps: ArrayLike, masks: ArrayLike, pro_limit: float = 0.3) -> PixelMetrics:
    """Return pixel AUROC and AUPRO from the same sort; arguments as `aupro`.

    Raises:
        MetricError: no maps, NaN or Inf scores, maps and masks of different shapes, masks that are not two-valued,
            a limit outside (0, 1], or pixels of one class only.
    """
    _check_limit(pro_limit)
    return _pixel_metrics(*_checked_maps(maps, masks), pro_limit)


def evaluate(
    maps: ArrayLike, masks: ArrayLike, image_scores: ArrayLike, labels: ArrayLike, pro_limit: float = 0.3
) -> Metrics:
    """Return image AUROC, pixel AUROC and AUPRO of one test set.

    Args:
        maps: anomaly maps [N, H, W], or a sequence of [H_i, W_i].
        masks: ground truth of the same shapes; all 0 for normal images.
        image_scores: [N].
        labels: [N], 0 for normal images.
        pro_limit: largest false positive rate of the AUPRO, in (0, 1].

    Raises:
        MetricError: as `auroc` and `pixel_metrics`; also a normal image whose mask has anomalous pixels.
    """
    images = _checked_images(maps, masks, image_scores, labels, pro_limit)
    image_auroc = _rank(images.scores[~images.anomalous], images.scores[images.anomalous], "image").auroc()
    return images.metrics(image_auroc, _pixel_metrics(images.maps, images.masks, pro_limit))


def measure(
    maps: ArrayLike,
    masks: ArrayLike,
    image_scores: ArrayLike,
    labels: ArrayLike,
    pro_limit: float = 0.3,
    has_truth: ArrayLike | None = None,
) -> Metrics:
    """Return the metrics as `evaluate` does, with NaN in place of an error for those that a test set does not define.

    Image AUROC needs normal and anomalous images; pixel AUROC and AUPRO need normal and anomalous pixels.

    Args:
        maps, masks, image_scores, labels, pro_limit: as `evaluate`.
        has_truth: [N], False for images whose masks do not tell their truth; these count for the image AUROC alone.

    Raises:
        MetricError: as `evaluate`, except for a class without images or pixels.
    """
    images = _checked_images(maps, masks, image_scores, labels, pro_limit)
    normal, anomalous = images.scores[~images.anomalous], images.scores[images.anomalous]
    image_auroc = _rank(normal, anomalous, "image").auroc() if normal.size and anomalous.size else math.nan
    known = np.ones(len(images.maps), dtype=bool) if has_truth is None else _to_numpy(has_truth).astype(bool)
    if known.shape != (len(images.maps),):
        raise MetricError(f"{len(images.maps)} maps but has_truth of shape {known.shape}; give one value per map")
    map_list = [scores for scores, told in zip(images.maps, known, strict=True) if told]
    mask_list = [mask for mask, told in zip(images.masks, known, strict=True) if told]
    pixels, n_anomalous = sum(mask.size for mask in mask_list), sum(map(np.count_nonzero, mask_list))
    if 0 < n_anomalous < pixels:
        pixel = _pixel_metrics(map_list, mask_list, pro_limit)
    else:
        pixel = PixelMetrics(math.nan, math.nan, label_regions(mask_list).sizes.size)
    return images.metrics(image_auroc, pixel)


def official_pro(maps: ArrayLike, masks: ArrayLike, limit: float = 0.3, steps: int = 1000) -> float:
    """Return the AUPRO as the official BGAD code computes it, for comparison with numbers obtained that way.

    It differs from `aupro` in four ways: thresholds are `steps` values linear in score from the largest (included) to
    the smallest (not included); a region's holes count as found but not in its size, so an overlap may exceed 1; the
    curve stops at the last threshold with FPR <= limit instead of being interpolated there; and the FPRs kept are
    stretched to [0, 1] before the trapezoid rule. Thresholds are computed in float64 and rounded to the scores' dtype,
    in which the official code compares them.

    Args:
        maps, masks: as `aupro`.
        limit: largest false positive rate, in (0, 1].
        steps: number of thresholds.

    Raises:
        MetricError: as `pixel_metrics`; also where fewer than two different FPRs lie within the limit.
    """
    _check_limit(limit)
    if steps < 2:
        raise MetricError(f"steps is {steps}; the official PRO needs at least 2 thresholds")
    map_list, mask_list = _checked_maps(maps, masks)
    normal, _ = _split(map_list, mask_list)
    if not any(mask.any() for mask in mask_list):
        raise _one_class("pixel", "anomalous")
    if normal.size == 0:
        raise _one_class("pixel", "normal")

    top = max(float(scores.max()) for scores in map_list)
    bottom = min(float(scores.min()) for scores in map_list)
    thresholds = (top - np.arange(steps) * ((top - bottom) / steps)).astype(normal.dtype)  # [steps], descending

    def first_step(scores: Array) -> NDArray[np.int64]:
        """Return the first threshold strictly below each score; `steps` where none is."""
        return steps - np.searchsorted(thresholds[::-1], scores, side="left")

    def found_by_step(scores: Array) -> NDArray[np.int64]:
        """Return the number of `scores` above each threshold."""
        return np.cumsum(np.bincount(first_step(scores), minlength=steps + 1)[:steps])

    normal.sort()
    false_positives = normal.size - np.searchsorted(normal, thresholds, side="right")
    overlap = np.zeros(steps)
    n_regions = 0
    for region in filled_regions(mask_list):
        overlap += found_by_step(map_list[region.image][region.box][region.filled]) / region.size
        n_regions += 1

    fpr = false_positives / normal.size
    kept = fpr <= limit
    fpr, pro = fpr[kept], overlap[kept] / n_regions
    if fpr[0] == fpr[-1]:
        raise MetricError(
            f"the official PRO is not defined: all of its {len(fpr)} thresholds with FPR <= {limit} have the same FPR; "
            "use aupro, more steps or a larger limit"
        )
    fpr = (fpr - fpr[0]) / (fpr[-1] - fpr[0])
    return float(np.sum(np.diff(fpr) * (pro[1:] + pro[:-1]) / 2))


class _Images(NamedTuple):
    """Images whose shapes, values and labels fit together."""

    maps: list[Array]
    masks: list[Mask]
    scores: Array  # [N]
    anomalous: NDArray[np.bool_]  # [N]
    pro_limit: float

    def metrics(self, image_auroc: float, pixel: PixelMetrics) -> Metrics:
        counts = self.scores.size, int(np.count_nonzero(self.anomalous)), pixel.n_regions
        return Metrics(image_auroc, pixel.auroc, pixel.aupro, self.pro_limit, *counts)


def _checked_images(
    maps: ArrayLike, masks: ArrayLike, image_scores: ArrayLike, labels: ArrayLike, pro_limit: float
) -> _Images:
    _check_limit(pro_limit)
    scores, anomalous = _checked_pair(image_scores, labels, "the image scores", "the labels")
    map_list, mask_list = _checked_maps(maps, masks)
    if scores.shape != (len(map_list),):
        raise MetricError(f"{len(map_list)} maps but image scores of shape {scores.shape}; give one score per map")
    for index, mask in enumerate(mask_list):
        if not anomalous[index] and mask.any():
            raise MetricError(f"image {index} is labeled normal but its mask has anomalous pixels; correct one of them")
    return _Images(map_list, mask_list, scores, anomalous, pro_limit)


class _Ranks(NamedTuple):
    """Ranks of anomalous scores among the normal ones."""

    above: NDArray[np.int64]  # [P] normal scores > it
    equal: NDArray[np.int64]  # [P] normal scores == it
    n_normal: int

    def auroc(self) -> float:
        # Twice the Mann-Whitney statistic is an integer; Python's integer division rounds once, at the end.
        pairs = self.above.size * self.n_normal
        return (2 * pairs - 2 * int(self.above.sum()) - int(self.equal.sum())) / (2 * pairs)

    def areas(self, limit: float) -> NDArray[np.float64]:
        """Return the area [P] under each pixel's own curve for FPR in [0, limit], divided by limit."""
        reach = limit * self.n_normal
        x = np.maximum(reach - self.above, 0.0)
        r = np.minimum(x, self.equal)
        return (x - r + r * r / (2 * np.maximum(self.equal, 1))) / reach


def _rank(normal: Array, anomalous: Array, unit: str) -> _Ranks:
    """Rank `anomalous` [P] among `normal` [M], which is sorted in place, in one run per thread."""
    if anomalous.size == 0:
        raise _one_class(unit, "anomalous")
    if normal.size == 0:
        raise _one_class(unit, "normal")
    # Ascending queries walk through the sorted scores instead of jumping about in memory.
    order = np.argsort(anomalous)
    queries = anomalous[order]

    def sort_and_count(run: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        run.sort()
        return np.searchsorted(run, queries, side="left"), np.searchsorted(run, queries, side="right")

    # Sorted runs need no merging: the counts of the runs add up.
    threads = max(1, min(torch.get_num_threads(), _MOST_THREADS, normal.size // _SCORES_PER_THREAD))
    with ThreadPoolExecutor(threads) as pool:
        counts = list(pool.map(sort_and_count, np.array_split(normal, threads)))
    below = np.empty(anomalous.size, dtype=np.int64)
    at_most = np.empty(anomalous.size, dtype=np.int64)
    below[order] = sum(left for left, _ in counts)
    at_most[order] = sum(right for _, right in counts)
    return _Ranks(normal.size - at_most, at_most - below, normal.size)


def _pixel_metrics(maps: list[Array], masks: list[Mask], pro_limit: float) -> PixelMetrics:
    ranks = _rank(*_split(maps, masks), "pixel")
    regions = label_regions(masks)
    n_regions = regions.sizes.size
    per_region = np.bincount(regions.of_pixel, weights=ranks.areas(pro_limit), minlength=n_regions) / regions.sizes
    return PixelMetrics(ranks.auroc(), float(per_region.mean()), n_regions)


def _split(maps: list[Array], masks: list[Mask]) -> tuple[Array, Array]:
    """Return all normal scores [M] and all anomalous scores [P], image after image, in raster order."""
    dtype = np.result_type(*{scores.dtype for scores in maps})
    n_pixels = sum(mask.size for mask in masks)
    n_anomalous = sum(int(np.count_nonzero(mask)) for mask in masks)
    normal = np.empty(n_pixels - n_anomalous, dtype=dtype)
    anomalous = np.empty(n_anomalous, dtype=dtype)
    m = p = 0
    for scores, mask in zip(maps, masks, strict=True):
        part = scores[~mask]
        normal[m : m + part.size] = part
        m += part.size
        part = scores[mask]
        anomalous[p : p + part.size] = part
        p += part.size
    return normal, anomalous


def _checked_maps(maps: ArrayLike, masks: ArrayLike) -> tuple[list[Array], list[Mask]]:
    """Return maps and masks as lists of numpy arrays [H_i, W_i]; raise unless shapes are equal and values usable."""
    # One transfer for a whole tensor instead of one per image.
    maps, masks = (_to_numpy(x) if isinstance(x, torch.Tensor) else x for x in (maps, masks))
    if len(maps) != len(masks):
        raise MetricError(f"{len(maps)} maps but {len(masks)} masks; give one mask per map")
    if len(maps) == 0:
        raise MetricError("no maps were given; a metric needs at least one normal and one anomalous pixel")
    pairs = []
    for index, (scores, mask) in enumerate(zip(maps, masks, strict=True)):
        pairs.append(_checked_pair(scores, mask, f"map {index}", f"mask {index}"))
        shape = pairs[-1][0].shape
        if len(shape) != 2:
            raise MetricError(f"map {index} has the shape {shape}; maps are [N, H, W] or a sequence of [H, W]")
    return [scores for scores, _ in pairs], [mask for _, mask in pairs]


def _checked_pair(scores: ArrayLike, truth: ArrayLike, name: str, truth_name: str) -> tuple[Array, Mask]:
    values, labels = _to_numpy(scores), _to_numpy(truth)
    if values.shape != labels.shape:
        raise MetricError(f"{name} and {truth_name} differ in shape: {values.shape} and {labels.shape}")
    if values.dtype.kind not in "fiub" or labels.dtype.kind not in "fiub":
        raise MetricError(f"{name} and {truth_name} must be real numbers, not {values.dtype} and {labels.dtype}")
    if not np.isfinite(values).all():
        bad = values.size - int(np.count_nonzero(np.isfinite(values)))
        raise MetricError(f"{name}: {bad} of {values.size} values are NaN or Inf; a ranking needs finite scores")
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    elif values.dtype.itemsize < 4:
        values = values.astype(np.float32)  # exact, and far faster to compare than float16
    if labels.dtype != np.bool_:
        positive = labels != 0
        largest = labels.max(initial=0)
        if not np.array_equal(labels, positive * largest):
            raise MetricError(f"{truth_name}: values other than 0 and one positive value; binarize the ground truth")
        labels = positive
    return values, labels


def _to_numpy(values: ArrayLike) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise MetricError(f"scores and ground truth must be arrays of numbers: {error}") from error


def _check_limit(limit: float) -> None:
    if not 0 < limit <= 1:
        raise MetricError(f"the FPR limit is {limit}; it must lie in (0, 1]")


def _one_class(unit: str, missing: str) -> MetricError:
    return MetricError(f"there is no {missing} {unit}; the metric needs both normal and anomalous {unit}s")
