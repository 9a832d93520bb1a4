"""Metrics of evaluated models, as the commands print and write them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import METHOD_NAMES, TrainConfig
from ..data import Sample
from ..data.vanished import vanished_masks
from ..errors import Notice
from ..evaluate import Evaluation, evaluate_model, false_alarms, metrics_dict, not_measured, run_report
from ..evaluate.report import RunReport
from ..model.detector import BGAD
from ..render import console
from ..system.environment import machine, versions
from ..system.files import write_json
from ..train import FitResult

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
COLUMNS = ("image AUROC", "pixel AUROC", "AUPRO")
"""Headings of `metric_values`."""


def metric_values(evaluation: Evaluation) -> tuple[float, float, float]:
    """Return image AUROC, pixel AUROC and AUPRO."""
    metrics = evaluation.metrics
    return metrics.image_auroc, metrics.pixel_auroc, metrics.aupro


def method_of(model: BGAD) -> str:
    """Return the name of the method that a model was trained with, "model" for one that does not say."""
    method = model.history.get("config", {}).get("method", "")
    return METHOD_NAMES.get(method, "model")


def evaluate_with_bar(title: str, model: BGAD, samples: Sequence[Sample], workers: int, **options: Any) -> Evaluation:
    """Evaluate a model on test samples while a bar shows the progress."""
    with console.image_bar(f"{title} · test", len(samples)) as on_images:
        return evaluate_model(model, samples, workers=workers, on_images=on_images, **options)


def write_metrics(folder: Path, model: BGAD, evaluation: Evaluation, result: FitResult | None = None) -> None:
    """Write metrics.json: metrics, decisions, and the seconds of a training."""
    content = {**metrics_dict(evaluation.metrics), **false_alarms(model, evaluation)}
    if result is not None:
        content |= {"seconds": result.seconds, "feature_seconds": result.feature_seconds}
    write_json(folder / METRICS_FILE, {**content, "machine": machine(), "versions": versions()})


def write_untested(folder: Path, result: FitResult) -> None:
    """Write metrics.json of a training without any test image: no metric has a value."""
    names: dict[str, Any] = dict.fromkeys(("image_auroc", "pixel_auroc", "aupro", "pro_limit"))
    counts = {"n_images": 0, "n_anomalous": 0, "n_regions": 0}
    seconds = {"seconds": result.seconds, "feature_seconds": result.feature_seconds}
    write_json(folder / METRICS_FILE, {**names, **counts, **seconds, "machine": machine(), "versions": versions()})


def tell_vanished(samples: Sequence[Sample], size: tuple[int, int], trained: bool = False) -> None:
    """Issue a notice about masks of which no pixel is left at a model's size, if there are any.

    Args:
        samples: test images and known anomalies.
        size: (height, width) of the model.
        trained: True if the model is trained already, so that another size takes another training.
    """
    masks = vanished_masks(samples, size)
    if masks.by_type:
        remedy = masks.remedy()
        if trained and masks.smallest_size() is not None:
            remedy = f"training with {remedy}"
        warnings.warn(f"{masks.sentence()}: pixel metrics cannot see them; {remedy}", Notice, stacklevel=2)


def print_metrics(rows: Sequence[tuple[str, str, Evaluation]]) -> None:
    """Print a table of the metrics, a row for each (category, method, evaluation), and what was not measured."""
    console.print_table(
        "Test images",
        ("category", "method", *COLUMNS),
        [(category, method, *metric_values(evaluation)) for category, method, evaluation in rows],
    )
    for reason in dict.fromkeys(filter(None, (not_measured(evaluation) for _, _, evaluation in rows))):
        print(reason)


def print_decisions(shares: Mapping[str, float]) -> None:
    """Print the shares of test images beyond the explicit boundary, nothing for a model without one."""
    rows = [
        (edge, *(_percent(shares.get(f"{kind}_images_beyond_{edge}")) for kind in ("anomalous", "normal")))
        for edge in ("b_n", "b_a")
        if shares
    ]
    if rows:
        console.print_table("Test images beyond the boundary", ("boundary", "anomalous", "normal"), rows)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def report_of(category: str, config: TrainConfig, model: BGAD, evaluation: Evaluation, result: FitResult) -> RunReport:
    """Return the report of a model that was just trained."""
    return run_report(
        category,
        METHOD_NAMES[config.method],
        model,
        evaluation,
        history=result.history,
        seconds=result.seconds,
        config={"architecture": model.architecture(), "training": config.as_dict(), "machine": machine()},
        versions=versions(),
    )
