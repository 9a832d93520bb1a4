"""The HTML report: one self-contained file with metrics, pictures, likelihoods, training curves and configuration.

No script, no address outside the file: photographs are JPEGs and charts SVGs inside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data import load_sample
from ..errors import ConfigError, DataError, FeatureError
from ..features.store import cell_mask
from ..model.detector import BGAD
from ..render import plots
from ..render.html_page import css_color, flat_items, render
from ..render.thumbnails import jpeg_address, shrink_map, shrink_mask, thumbnail
from ..system.files import write_text
from .evaluation import Evaluation, not_measured, tells_truth

_METRIC_NAMES = {"image_auroc": "Image AUROC", "pixel_auroc": "Pixel AUROC", "aupro": "AUPRO"}
_NOT_METRICS = ("pro_limit", "n_images", "n_anomalous", "n_regions")


@dataclass(frozen=True, eq=False)
class ImageRow:
    """One test image.

    Attributes:
        name: file name, unique within its category.
        defect: kind of defect, or "good".
        label: 0 normal, 1 anomalous.
        score: image score.
        image: uint8 [H, W, 3].
        mask: bool [H, W] ground truth; None where there is none.
        anomaly_map: float [H, W].
        decision: uint8 [H, W]: 0 normal side of b_n, 1 in the margin, 2 beyond b_a.
    """

    name: str
    defect: str
    label: int
    score: float
    image: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None
    anomaly_map: NDArray[Any]
    decision: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class LevelHistogram:
    """The log-likelihoods (divided by the normalizer) of one feature level's test patches.

    Attributes:
        name: name of the level.
        normal: of normal patches, any shape.
        anomalous: of anomalous patches, any shape, may be empty.
        b_n: normal boundary, in the same unit.
        b_a: anomalous boundary b_n - tau; None where the method has no margin.
    """

    name: str
    normal: NDArray[Any]
    anomalous: NDArray[Any]
    b_n: float
    b_a: float | None


@dataclass(frozen=True, eq=False)
class RunReport:
    """One method on one category.

    Attributes:
        category: name of the category.
        method: "NFAD", "BGAD", ...
        metrics: image_auroc, pixel_auroc, aupro, ... in [0, 1], NaN where they are not defined.
        rows: test images.
        levels: one per feature level.
        history: one mapping per pass over the training images: pass, loss, loss_ml, loss_n, loss_a, lr, b_n_0, ...
        seconds: duration of the training.
        map_range: scores of the first and the last color of this run's anomaly maps.
        config: the configuration, possibly nested.
        versions: package -> version.
        note: a sentence on metrics that are not defined (NaN), if there are any.
    """

    category: str
    method: str
    metrics: Mapping[str, float]
    rows: Sequence[ImageRow]
    levels: Sequence[LevelHistogram] = ()
    history: Sequence[Mapping[str, float]] = ()
    seconds: float = math.nan
    map_range: tuple[float, float] = (0.0, 1.0)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def image_rows(model: BGAD, evaluation: Evaluation) -> list[ImageRow]:
    """Return what a report shows of every test image."""
    return [
        ImageRow(
            name=sample.name,
            defect=sample.defect,
            label=sample.label,
            score=float(evaluation.image_scores[i]),
            image=load_sample(sample, model.image_size, needs_mask=False).image.permute(1, 2, 0).numpy(),
            mask=evaluation.masks[i].numpy() if tells_truth(sample) else None,
            anomaly_map=evaluation.maps[i].numpy(),
            decision=evaluation.decisions[i].numpy(),
        )
        for i, sample in enumerate(evaluation.samples)
    ]


def level_histograms(model: BGAD, evaluation: Evaluation) -> list[LevelHistogram]:
    """Return the test patches' log-likelihoods by level, normal apart from anomalous, where that is known."""
    histograms, known = [], evaluation.has_truth
    for level, all_lp in enumerate(evaluation.levels):
        lp = all_lp[known]
        mask = cell_mask(evaluation.masks[known], (lp.shape[1], lp.shape[2]), "nearest")
        u = lp / model.normalizer
        b_n, b_a = model.boundaries[level].tolist()
        name = f"level {level + 1}, stride {model.backbone.strides[level]}"
        histograms.append(LevelHistogram(name, u[~mask].numpy(), u[mask].numpy(), b_n, b_a))
    return histograms


def run_report(
    category: str,
    method: str,
    model: BGAD,
    evaluation: Evaluation,
    *,
    history: Sequence[Mapping[str, float]] = (),
    seconds: float = float("nan"),
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> RunReport:
    """Return the evaluation of one method on one category, ready for `write_report`.

    The map's colors run from the median score of the test pixels to the largest one: the same for every image.
    """
    sample = evaluation.maps.reshape(-1)[:: max(1, evaluation.maps.numel() // 1_000_000)]
    return RunReport(
        category=category,
        method=method,
        metrics={name: float(value) for name, value in evaluation.metrics._asdict().items()},
        rows=image_rows(model, evaluation),
        levels=level_histograms(model, evaluation),
        history=history,
        seconds=seconds,
        map_range=(float(sample.median()), float(evaluation.maps.max())),
        config=config or {},
        versions=versions or {},
        note=not_measured(evaluation),
    )


def write_report(path: str | Path, runs: Sequence[RunReport], title: str, max_images: int = 10) -> None:
    """Write the report of `runs` as one HTML file, with runs of the same category side by side.

    Args:
        path: the file to write.
        runs: one per category and method.
        title: heading of the report.
        max_images: how many test images to show per category.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
        ConfigError: no runs, or two runs of the same category and method.
        DataError: a picture, map, mask and decision of one image differ in size.
        FeatureError: an anomaly map holds NaN or Inf.
        OutputError: the file cannot be written; an earlier file is kept.
    """
    if not runs:
        raise ConfigError("a report needs at least one run")
    seen = [(run.category, run.method) for run in runs]
    if twice := [pair for pair in dict.fromkeys(seen) if seen.count(pair) > 1]:
        raise ConfigError(f"two runs of the method {twice[0][1]} on the category {twice[0][0]}; give each run once")

    methods = list(dict.fromkeys(run.method for run in runs))
    categories = list(dict.fromkeys(run.category for run in runs))
    page = render(
        __package__,
        "report.html.jinja",
        title=title,
        methods=methods,
        tables=list(_metric_tables(runs, categories, methods)),
        sections=[_section([run for run in runs if run.category == name], max_images) for name in categories],
        notes=[(f"{run.category}, {run.method}", run.note) for run in runs if run.note],
        config=_comparison(runs, lambda run: run.config),
        versions=_comparison(runs, lambda run: run.versions),
        heat_gradient=", ".join(css_color(color) for color in plots.HEAT_COLORS),
        ground_truth_color=css_color(plots.GROUND_TRUTH_COLOR),
        margin_color=css_color(plots.MARGIN_COLOR),
        anomalous_color=css_color(plots.ANOMALOUS_COLOR),
    )
    write_text(path, page)


class MetricCell(NamedTuple):
    """A formatted value and whether it is the best of its row."""

    text: str
    best: bool


class MetricTable(NamedTuple):
    """One metric: rows of (category, one cell per method, difference); the last row is the mean if `has_mean`."""

    name: str
    rows: list[tuple[str, list[MetricCell], str]]
    difference: str
    has_mean: bool


def _metric_tables(runs: Sequence[RunReport], categories: list[str], methods: list[str]) -> Iterator[MetricTable]:
    values = {(run.category, run.method): run.metrics for run in runs}
    keys = dict.fromkeys([*_METRIC_NAMES, *(key for run in runs for key in run.metrics)])
    compared = "BGAD − NFAD" if {"BGAD", "NFAD"} <= set(methods) else ""
    for key in keys:
        if key in _NOT_METRICS or not any(key in run.metrics for run in runs):
            continue
        lines = [(name, [float(values.get((name, m), {}).get(key, math.nan)) for m in methods]) for name in categories]
        has_mean = len(categories) > 1
        if has_mean:
            # A mean over other categories than its neighbor's would not be comparable: NaN stays NaN.
            lines.append(("Mean", np.mean([line for _, line in lines], axis=0).tolist()))
        rows = []
        for name, line in lines:
            finite = [value for value in line if math.isfinite(value)]
            cells = [MetricCell(_percent(v), len(finite) > 1 and _percent(v) == _percent(max(finite))) for v in line]
            change = line[methods.index("BGAD")] - line[methods.index("NFAD")] if compared else math.nan
            rows.append((name, cells, f"{100 * change:+.2f}".replace("-", "−") if math.isfinite(change) else "–"))
        yield MetricTable(_METRIC_NAMES.get(key, key.replace("_", " ")), rows, compared, has_mean)


def _section(runs: Sequence[RunReport], max_images: int) -> dict[str, Any]:
    """Return what the template shows of one category."""
    rows = {row.name: row for run in runs for row in run.rows}
    by_run = [{row.name: row for row in run.rows} for run in runs]
    # The images are ranked by the last run, the method of interest where NFAD comes first.
    ranking = {**{name: row.score for name, row in rows.items()}, **{row.name: row.score for row in runs[-1].rows}}
    chosen = _choose(list(rows.values()), ranking, max_images)
    return {
        "category": runs[0].category,
        "n_normal": sum(row.label == 0 for row in rows.values()),
        "n_anomalous": sum(row.label != 0 for row in rows.values()),
        "n_hidden": len(rows) - len(chosen),
        "samples": [_sample(row, runs, by_run) for row in chosen],
        "runs": [_run(run) for run in runs],
    }


def _choose(rows: list[ImageRow], ranking: Mapping[str, float], count: int) -> list[ImageRow]:
    """Return up to `count` images, those first that are the likeliest mistakes.

    Kinds of defects take turns; each gives its image with the lowest score, then that with the highest, the second
    lowest and so on. Normal images begin with the highest score. The result is ordered by kind, normal images last, and
    within a kind with the likeliest mistake first.
    """
    kinds: dict[tuple[bool, str], list[ImageRow]] = {}
    for row in sorted(rows, key=lambda row: (row.label == 0, row.defect, row.name)):
        kinds.setdefault((row.label == 0, row.defect), []).append(row)
    for (is_normal, _), members in kinds.items():
        members.sort(key=lambda row: ranking[row.name], reverse=is_normal)
    turns = {kind: list(_from_both_ends(members)) for kind, members in kinds.items()}
    queue = [members[turn] for turn in range(len(rows)) for members in turns.values() if turn < len(members)]
    kept = {row.name for row in queue[:count]}
    return [row for members in kinds.values() for row in members if row.name in kept]


def _from_both_ends(members: Sequence[ImageRow]) -> Iterator[ImageRow]:
    """Yield the first, the last, the second, the second last, ..."""
    for index in range(len(members)):
        yield members[index // 2 if index % 2 == 0 else -1 - index // 2]


def _sample(row: ImageRow, runs: Sequence[RunReport], by_run: Sequence[Mapping[str, ImageRow]]) -> dict[str, Any]:
    photo = thumbnail(row.image, row.name)
    panels = [{"caption": "Input", "alt": f"photograph {row.name}", "src": jpeg_address(photo)}]
    if row.mask is None:
        panels.append({"caption": "Ground truth", "alt": "", "src": "", "missing": "no mask"})
    else:
        _require_size(row.mask, row, "mask")
        truth = plots.mask_contour(photo, shrink_mask(row.mask, photo))
        alt = f"{row.name} with the true defect outlined" if row.mask.any() else f"{row.name}, no defect"
        panels.append({"caption": "Ground truth", "alt": alt, "src": jpeg_address(truth)})
    for run, rows in zip(runs, by_run, strict=True):
        tested = rows.get(row.name)
        if tested is None:
            missing = f"not among the test images of {run.method}"
            panels += [
                {"caption": f"{run.method} {what}", "src": "", "missing": missing} for what in ("map", "decision")
            ]
            continue
        _require_size(tested.anomaly_map, tested, "anomaly map")
        _require_size(tested.decision, tested, "decision")
        if not np.isfinite(tested.anomaly_map).all():
            raise FeatureError(f"report: the anomaly map of {tested.name} holds NaN or Inf; score the image again")
        heat = plots.heat_overlay(photo, shrink_map(tested.anomaly_map, photo), *run.map_range)
        decision = plots.decision_contour(photo, _shrink_decision(tested.decision, photo))
        shares = f"{np.mean(tested.decision == 1):.1%} in the margin, {np.mean(tested.decision == 2):.1%} beyond b_a"
        panels += [
            {
                "caption": f"{run.method} map",
                "score": _number(tested.score),
                "alt": f"anomaly map of {row.name} by {run.method}, image score {_number(tested.score)}",
                "src": jpeg_address(heat),
            },
            {
                "caption": f"{run.method} decision",
                "alt": f"decision of {run.method} on {row.name}: {shares}",
                "src": jpeg_address(decision),
            },
        ]
    return {"name": row.name, "defect": row.defect, "label": row.label, "panels": panels}


def _run(run: RunReport) -> dict[str, Any]:
    scores = {label: np.array([row.score for row in run.rows if bool(row.label) == label]) for label in (False, True)}
    levels = [plots.likelihood_chart(x.name, x.normal, x.anomalous, x.b_n, x.b_a) for x in run.levels]
    curves = [
        plots.history_chart("Loss", run.history, ["loss"]),
        plots.history_chart("Boundaries", run.history, ["b_n", "b_a"]),
    ]
    return {
        "method": run.method,
        "seconds": _duration(run.seconds),
        "map_range": [_number(value) for value in run.map_range],
        "scores": plots.score_chart("Image scores", scores[False], scores[True]),
        "levels": levels,
        "curves": curves if run.history else [],
    }


def _comparison(
    runs: Sequence[RunReport], of: Callable[[RunReport], Mapping[str, Any]]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (key, [(runs, value)]): one entry where all runs agree (its runs are ""), else one per distinct value."""
    flat = [dict(flat_items(of(run))) for run in runs]
    table = []
    for key in dict.fromkeys(key for entry in flat for key in entry):
        owners: dict[str, list[str]] = {}
        for run, entry in zip(runs, flat, strict=True):
            owners.setdefault(str(entry.get(key, "–")), []).append(f"{run.category} {run.method}")
        one = len(owners) == 1
        table.append((key, [("" if one else ", ".join(names), value) for value, names in owners.items()]))
    return table


def _shrink_decision(decision: NDArray[Any], photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    plane = Image.fromarray(np.ascontiguousarray(decision, dtype=np.uint8))
    return np.asarray(plane.resize((photo.shape[1], photo.shape[0]), Image.Resampling.NEAREST))


def _require_size(plane: NDArray[Any], row: ImageRow, name: str) -> None:
    if plane.shape != row.image.shape[:2]:
        picture = list(row.image.shape[:2])
        raise DataError(f"report: the {name} of {row.name} has the size {list(plane.shape)}, its picture {picture}")


def _percent(value: float) -> str:
    return f"{100 * value:.2f}" if math.isfinite(value) else "–"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "not recorded"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
