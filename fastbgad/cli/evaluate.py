"""`fastbgad evaluate`: measure a trained model on test images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from ..evaluate import CalibrationName, Evaluation, false_alarms, run_report
from ..evaluate.metrics import official_pro
from ..evaluate.report import write_report
from ..evaluate.unseen import unseen_samples
from ..model.detector import BGAD
from ..render import console
from ..system.environment import choose_device, versions
from ..system.files import make_folder
from .opening import open_with_bar
from .options import Check, FileOptions, Layout
from .results import (
    REPORT_FILE,
    evaluate_with_bar,
    method_of,
    print_decisions,
    print_metrics,
    tell_vanished,
    write_metrics,
)


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model on a category's test images; anomalies it was trained on are left out.

    fastbgad evaluate --model runs/screw/model.safetensors --data mvtec --category screw
    """

    model: Path
    """A model.safetensors that train wrote."""
    data: Path
    """Folder of the dataset or of one category."""
    category: str | None = None
    """Name of the category; may be left out where there is only one."""
    layout: Layout = "auto"
    """How the folders are laid out."""
    check: Check = "full"
    """How thoroughly the dataset is checked first."""
    calibration: CalibrationName = "training"
    """training: constants of the model; official: maxima over this test set, as in the official code."""
    pro_limit: float = 0.3
    """Largest false-positive rate of the AUPRO integral."""
    official_pro: bool = False
    """Also compute PRO as the official code does: 1000 thresholds, rescaled, holes filled."""
    out: Path | None = None
    """Folder for metrics.json and report.html; without it the metrics are only printed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 2
    """Threads that decode images."""
    files: Annotated[FileOptions, tyro.conf.arg(name="")] = field(default_factory=FileOptions)

    def run(self) -> int:
        """Evaluate the model, print the metrics and, if asked to, write them; return the exit code."""
        model = BGAD.load(self.model, device=choose_device(self.device))
        files = self.files
        if files.bit_depth is None:  # as the model was trained, not as this lot looks
            files = replace(files, bit_depth=model.history.get("bit_depth"))
        category = open_with_bar(self.data, self.category, self.layout, self.check, files)
        samples, left_out = unseen_samples(model.history, category.test)
        if left_out:
            print(f"left out: {left_out}")
        tell_vanished(samples, model.image_size, trained=True)
        evaluation = evaluate_with_bar(
            category.name,
            model,
            samples,
            self.workers,
            calibration=self.calibration,
            pro_limit=self.pro_limit,
        )
        print_metrics([(category.name, method_of(model), evaluation)])
        print_decisions(false_alarms(model, evaluation))
        facts: dict[str, object] = {}
        if self.official_pro:
            facts["official PRO"] = console.decimals(_official_pro(evaluation, self.pro_limit))
        if not model.calibrated:
            facts["decisions"] = "none: the model has no calibration"
        if facts:
            console.print_facts(facts)
        if self.out is not None:
            write_results(make_folder(self.out), category.name, model, evaluation)
        return 0


def _official_pro(evaluation: Evaluation, limit: float) -> float:
    """Return the official PRO; NaN where the AUPRO is not defined either, for the same reason."""
    if math.isnan(evaluation.metrics.aupro):
        return math.nan
    known = evaluation.has_truth
    return official_pro(evaluation.maps[known], evaluation.masks[known], limit)


def write_results(folder: Path, category: str, model: BGAD, evaluation: Evaluation) -> None:
    """Write metrics.json and report.html."""
    write_metrics(folder, model, evaluation)
    report = run_report(
        category,
        method_of(model),
        model,
        evaluation,
        history=model.history.get("passes", []),
        config={"architecture": model.architecture(), "training": model.history.get("config", {})},
        versions=versions(),
    )
    write_report(folder / REPORT_FILE, [report], f"{category}: {method_of(model)}")
    print(f"report: {folder / REPORT_FILE}")
