"""`fastbgad bench`: time inference on images, print and write the rows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..backbones import Backbone, create_backbone
from ..bench import (
    BenchImages,
    Mode,
    Row,
    ThroughputConfig,
    ThroughputMeter,
    check_chart_path,
    generate_images,
    open_images,
    write_throughput_chart,
)
from ..ops import Impl, MatmulPrecision
from ..render import console
from ..system.environment import choose_device, machine, versions
from ..system.files import write_json
from ..wording import bullets
from .options import Dtype, Layout


@dataclass(frozen=True)
class Bench:
    """Time inference from image file to anomaly map, stage by stage, on your images or on generated ones.

    Needs no trained model and no download: throughput depends on the shapes, not on the weights.

    For example:

    fastbgad bench

    fastbgad bench --image-size 256 1024 --batch-size 1 8 --json bench.json --chart bench.png

    fastbgad bench --data mvtec --category screw --device cuda --dtype float16

    fastbgad bench --mode latency --backbone gabor --file-size 1024

    --mode throughput shows for every image size and batch size what each stage takes per image: decoding (with the
    resizing), the copy to the GPU, the backbone, the flow of every level, scores and decisions, and pixel AUROC with
    AUPRO. --mode latency measures single images and shows the median and the 99th percentile. Peak memory is what a
    stage needs beyond the memory held before it. On a GPU two more columns compare flows and scoring with the rates of
    a plain copy and a plain matrix product, which are measured first.

    If a row fails, for example because memory is too small, the error is printed and the other rows are measured; the
    exit code is then 2.
    """

    data: Path | None = None
    """Your images: a dataset, whose test images are used, or any folder of images; without it PNGs are generated."""
    category: str | None = None
    """Name of the category of a dataset with several."""
    layout: Layout = "auto"
    """How the folders of --data are laid out; auto treats a folder without a known layout as images only."""
    mode: Mode = "throughput"
    """throughput: a table of stages per batch size; latency: batches of one, median and 99th percentile."""
    batch_size: tuple[int, ...] = (1, 8, 32)
    """Images that go through the model together, several to compare; not for --mode latency."""
    image_size: tuple[int, ...] = (256,)
    """Pixels a side that the model works at, several to compare."""
    file_size: int | None = None
    """Pixels a side of the generated files (MVTec AD: 700 to 1024, BTAD: up to 1600); the image size if left out."""
    backbone: str = "tf_efficientnet_b6.aa_in1k"
    """gabor or any timm model with feature maps."""
    weights: str = "random"
    """random, pretrained (from the hub), package (needs fastbgad[weights]), or a .safetensors, .pth or .pt file."""
    levels: tuple[int, ...] = (1, 2, 3)
    """Feature levels, in timm's numbering."""
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
    same; float32: everywhere."""
    repeats: int | None = None
    """Timed passes per row; 5 for throughput and 100 for latency if left out."""
    warmup: int = 2
    """Passes before the timed ones."""
    workers: int = 2
    """Threads that decode images."""
    seed: int = 0
    """Seed of weights, generated files, and the choice among your images."""
    json: Path | None = None
    """File for all figures, rewritten after every row."""
    chart: Path | None = None
    """Chart of the rows as stacked bars, .png or .svg."""

    def run(self) -> int:
        """Time every image size and batch size; print and write each row as it comes.

        Returns:
            The exit code: 2 if a row failed.
        """
        config = ThroughputConfig(
            mode=self.mode,
            image_sizes=self.image_size,
            batch_sizes=self.batch_size,
            repeats=self.repeats,
            warmup=self.warmup,
            workers=self.workers,
            seed=self.seed,
        )
        device = choose_device(self.device)
        if self.chart is not None:
            check_chart_path(self.chart)
        images = None
        if self.data is not None:
            most = max(batch for _, batch in config.cases)
            images = open_images(self.data, self.category, self.layout, most, self.seed)
        backbone = self._backbone(device)
        self._write(config, [])
        meter = ThroughputMeter(backbone, config, device, impl=self.impl, matmul_precision=self.matmul_precision)
        self._print_head(config, device)
        if images is not None and images.skipped:
            skipped = f"left out because they cannot be read ({len(images.skipped)})"
            print(f"{skipped}:\n{bullets(images.skipped)}")
        rows = self._measure(meter, images)
        if self.chart is not None and any(row.failed is None for row in rows):
            write_throughput_chart(self.chart, rows)
            print(f"chart: {self.chart}")
        if self.json is not None:
            print(f"figures: {self.json}")
        return 2 if any(row.failed for row in rows) else 0

    def _backbone(self, device: torch.device) -> Backbone:
        options: dict[str, Any] = {"dtype": self.dtype, "compile": self.compile}
        if self.backbone != "gabor":
            options |= {"weights": self.weights, "seed": self.seed}
        return create_backbone(self.backbone, self.levels, **options).to(device)

    def _measure(self, meter: ThroughputMeter, images: BenchImages | None) -> list[Row]:
        """Measure all rows on the images given, or on generated ones."""
        rows: list[Row] = []
        described = ""
        cases = meter.config.cases
        with tempfile.TemporaryDirectory(prefix="fastbgad-bench-") as scratch:
            generated: dict[int, BenchImages] = {}
            for number, (side, batch) in enumerate(cases, start=1):
                row_images = images
                if row_images is None:
                    file_side = side if self.file_size is None else self.file_size
                    if file_side not in generated:
                        generated[file_side] = generate_images(Path(scratch), file_side, self.seed)
                    row_images = generated[file_side]
                with console.pass_bar(f"{side} px, batch {batch} ({number} of {len(cases)})") as on_pass:
                    row = meter.row(side, batch, row_images, on_pass)
                rows.append(row)
                self._write(meter.config, rows)
                if row.images != described:
                    described = row.images
                    print(f"images: {described}")
                if row.failed is None:
                    console.print_table(row.title, *row.table())
                else:
                    print(f"{row.title}: failed: {row.failed}", flush=True)
        return rows

    def _print_head(self, config: ThroughputConfig, device: torch.device) -> None:
        here, installed = machine(), versions()
        packages = ", ".join(f"{name} {installed[name]}" for name in ("fastbgad", "python", "torch", "timm", "triton"))
        print(
            f"{here['processor']}, {here['cores']} cores, {here['torch threads']} torch threads, GPU: {here['gpu']}; "
            f"{packages}; {self.backbone} {self.dtype} on {device}; for every row {config.warmup} whole passes to "
            f"warm up, then {config.timed_passes} timed ones, whose medians are shown",
            flush=True,
        )

    def _write(self, config: ThroughputConfig, rows: Sequence[Row]) -> None:
        """Write the figures so far, so that an interruption keeps those of finished rows."""
        if self.json is None:
            return
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        content = {
            "machine": machine(),
            "versions": versions(),
            "settings": settings | {"repeats": config.timed_passes},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": [row.as_dict() for row in rows],
        }
        write_json(self.json, content)
