"""Metrics of evaluated models, as the commands print and write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import METHOD_NAMES, TrainConfig
from ..data import Sample
from ..evaluate import Evaluation, evaluate_model, false_alarms, metrics_dict, run_report
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


def print_metrics(rows: Sequence[tuple[str, str, Evaluation]]) -> None:
    """Print a table of the metrics, a row for each (category, method, evaluation)."""
    console.print_table(
        "Test images",
        ("category", "method", *COLUMNS),
        [(category, method, *metric_values(evaluation)) for category, method, evaluation in rows],
    )


def print_decisions(shares: Mapping[str, float]) -> None:
    """Print the shares of test images beyond the explicit boundary, nothing for a model without one."""
    rows = [
        (edge, f"{shares[f'anomalous_images_beyond_{edge}']:.1%}", f"{shares[f'normal_images_beyond_{edge}']:.1%}")
        for edge in ("b_n", "b_a")
        if shares
    ]
    if rows:
        console.print_table("Test images beyond the boundary", ("boundary", "anomalous", "normal"), rows)


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
