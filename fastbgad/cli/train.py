"""`fastbgad train`: train a detector on one category, evaluate it, write a report."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from ..backbones import Standardize, create_backbone
from ..config import METHOD_NAMES, PRESETS, TrainConfig
from ..data import Category, Sample, Split, split_known_anomalies
from ..data.layouts import title_of
from ..data.splits import known_pool
from ..errors import BackboneError, Notice
from ..evaluate.evaluation import false_alarms
from ..evaluate.report import write_report
from ..features.store import Placement
from ..model.detector import BGAD
from ..ops import Impl, MatmulPrecision
from ..render import console
from ..system.ranks import device_of, find_rank, threads_of
from ..train import MODEL_FILE, FitResult, fit
from ..train.data_parallel import DataParallel, process_group
from ..train.items import check_images
from ..wording import count
from .opening import open_with_bar
from .options import STANDARDIZE, Check, Dtype, FileOptions, Layout, Preset
from .results import (
    REPORT_FILE,
    evaluate_with_bar,
    print_decisions,
    print_metrics,
    report_of,
    tell_vanished,
    write_metrics,
    write_untested,
)


@dataclass(frozen=True)
class Train:
    """Train a detector on one category, evaluate it, and write a report.

    For example:

    fastbgad train --data mvtec --category screw --out runs/screw

    fastbgad train --data photos --backbone gabor --preset demo --out runs/photos

    fastbgad train --data mvtec --category screw --out runs/screw --resume

    torchrun --nproc-per-node 4 -m fastbgad train --data mvtec --category screw --out runs/screw

    The last command shares a training among four GPUs or processes. Each keeps a part of the images; the boundary is
    computed from all rows, so the result equals that of one process up to rounding.

    Layouts: MVTec AD (CATEGORY/train/good, test/TYPE, ground_truth/TYPE), BTAD (CATEGORY/train/ok, test/ko,
    ground_truth/ko), or a plain folder with normal/, anomalous/ and masks/.
    """

    data: Path
    """Folder of the dataset or of one category."""
    out: Path
    """Run folder: configuration, log, checkpoints, metrics and report go there."""
    category: str | None = None
    """Name of the category; may be left out where there is only one."""
    layout: Layout = "auto"
    """How the folders are laid out."""
    check: Check = "full"
    """How thoroughly the dataset is checked first: full decodes every image."""
    types: tuple[str, ...] = ()
    """Draw known anomalies only from these defect types; all if empty."""
    backbone: str = "tf_efficientnet_b6.aa_in1k"
    """gabor (built in, needs no download) or any timm model with feature maps."""
    weights: str = "pretrained"
    """pretrained (from the hub), package (needs fastbgad[weights]), random, or a .safetensors, .pth or .pt file."""
    standardize: Standardize = STANDARDIZE["official"]
    """Bring features to mean 0 and variance 1 on the training normals: whiten (presets short and demo), or channel by
    channel; none: leave them as they are (preset official). gabor has a standardization of its own."""
    neighborhood: int | None = None
    """Average features of stride 8 and more over so many patches a side (odd); 1: not at all, as the official code.
    None: 3, or 1 with --standardize none."""
    levels: tuple[int, ...] = (1, 2, 3)
    """Feature levels, in timm's numbering."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width in pixels that images are resized to."""
    dtype: Dtype = "float32"
    """Precision of the backbone."""
    compile: bool = False
    """Run the backbone through torch.compile."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    impl: Impl = "auto"
    """Implementation of the operations; auto takes the fastest there is: triton on a GPU; elsewhere native (C++ that is
    compiled at its first use) for the flow where there is a compiler, and torch."""
    matmul_precision: MatmulPrecision = "auto"
    """Operands of the flows' matrix products. auto: float16 on a GPU (sums in float32), float32 on a CPU; float16: the
    same; float32: everywhere; bfloat16: trains faster on a CPU that has instructions for it."""
    placement: Placement = "auto"
    """Where extracted features are kept."""
    workers: int = 2
    """Threads that decode images."""
    resume: bool = False
    """Continue the run in --out, bit for bit on the same machine."""
    report: bool = True
    """Write report.html."""
    files: Annotated[FileOptions, tyro.conf.arg(name="")] = field(default_factory=FileOptions)
    preset: Preset = "official"
    """Defaults of everything below: the paper's schedule (200 passes over the images), short (24 passes, minutes on a
    CPU) or demo (8 passes). --preset short --help shows those."""
    training: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def run(self) -> int:
        """Train, or resume a training, and evaluate; return the exit code."""
        config = self.training
        rank = find_rank()
        device = device_of(rank, self.device)
        threads = threads_of(rank)
        if threads is not None:
            torch.set_num_threads(threads)
        # Each file need be checked by one process only.
        check = self.check if rank.is_first else "none"
        with warnings.catch_warnings():
            if not rank.is_first:
                warnings.simplefilter("ignore", Notice)  # each need be said by one process only
            category = open_with_bar(self.data, self.category, self.layout, check, self.files)
        known = config.anomalies.num_anomalies if config.uses_anomalies else 0
        split = split_known_anomalies(category, known, config.anomalies.per_type, config.seed, self.types or None)
        check_images(split, config)  # before the backbone's weights are loaded
        if rank.is_first:
            tell_vanished([*split.known_anomalies, *split.test], self.image_size)
        model = self._new_model(device)
        if rank.is_first:
            shared = f", {rank.world} processes" if rank.world > 1 else ""
            print(f"{images_text(category, split)}; {METHOD_NAMES[config.method]} on {device}{shared}")
        bar = console.training_bar(category.name) if rank.is_first else nullcontext()
        with process_group(rank, device) as parallel, bar as on_progress:
            if parallel is not None:
                check_same_weights(model, parallel, device)
            result = fit(
                model,
                split,
                config,
                run_dir=self.out,
                resume=self.resume,
                placement=self.placement,
                workers=self.workers,
                parallel=parallel,
                on_progress=on_progress,
            )
        if rank.is_first:
            self._evaluate(category.name, model, split.test, result)
        return 0

    def _new_model(self, device: torch.device) -> BGAD:
        config = self.training
        options: dict[str, Any] = {}
        if self.backbone != "gabor":
            options = {
                "weights": self.weights,
                "seed": config.seed,
                "dtype": self.dtype,
                "compile": self.compile,
                "standardize": self.standardize,
                "neighborhood": self.neighborhood,
            }
        return BGAD(
            create_backbone(self.backbone, self.levels, **options).to(device),
            self.image_size,
            flow=config.flow,
            normalizer=config.loss.normalizer,
            seed=config.seed,
            impl=self.impl,
            matmul_precision=self.matmul_precision,
        ).to(device)

    def _evaluate(self, category: str, model: BGAD, samples: Sequence[Sample], result: FitResult) -> None:
        """Measure the trained model; print and write the metrics and the report."""
        method = METHOD_NAMES[self.training.method]
        if not samples:
            write_untested(self.out, result)
            print(f"nothing was measured: the category has no test image\nmodel:  {self.out / MODEL_FILE}")
            return
        evaluation = evaluate_with_bar(category, model, samples, self.workers)
        write_metrics(self.out, model, evaluation, result)
        print_metrics([(category, method, evaluation)])
        print_decisions(false_alarms(model, evaluation))
        if self.report:
            report = report_of(category, self.training, model, evaluation, result)
            write_report(self.out / REPORT_FILE, [report], f"{category}: {method}")
            print(f"report: {self.out / REPORT_FILE}")
        print(f"model:  {self.out / MODEL_FILE}")


def images_text(category: Category, split: Split) -> str:
    """Return how many images of a category are trained on, how many are known anomalies, and what the test has."""
    parts = [count(len(split.normals), "normal image")]
    if split.known_anomalies:
        known = count(len(split.known_anomalies), "known anomaly", "known anomalies")
        left = sum(sample.label for sample in split.test)
        remain = "" if category.known else f", {left} {'remains' if left == 1 else 'remain'} for the test"
        parts.append(f"{known} of {len(known_pool(category))}{remain}")
    parts.append(count(len(split.test), "test image"))
    return f"{category.name} ({title_of(category.layout)}): {', '.join(parts)}"


def train_defaults(preset: Preset) -> Train:
    """Return the command with the defaults of a preset."""
    return Train(
        data=tyro.MISSING,
        out=tyro.MISSING,
        standardize=STANDARDIZE[preset],
        preset=preset,
        training=PRESETS[preset](),
    )


def check_same_weights(model: BGAD, parallel: DataParallel, device: torch.device) -> None:
    """Refuse a shared training in which some processes reached the hub and others took the weights of a package."""
    packaged = getattr(model.backbone, "weights_source", None) == "package"
    count = int(parallel.sum(torch.tensor(int(packaged), device=device)))
    if count not in (0, parallel.world):
        raise BackboneError(
            f"{count} of {parallel.world} processes could not reach the hub and took the backbone's weights from a "
            "package, the others from the hub; give --weights package, so that all have the same"
        )
