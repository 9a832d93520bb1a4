"""What `fastbgad bench` does: opens or generates images, times them, prints and writes the rows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..backbones import create_backbone
from ..bench.chart import check_chart_path, write_throughput_chart
from ..bench.images import BenchImages, generate_images, open_images
from ..bench.meter import ThroughputConfig, ThroughputMeter
from ..bench.rows import Row
from ..render import console
from ..system.environment import choose_device, machine, versions
from ..system.files import write_json
from .parser import Bench


def bench(command: Bench) -> int:
    """Times inference on every image and batch size, and prints and writes the rows as they come."""
    config = ThroughputConfig(
        command.mode, command.image_size, command.batch_size, command.repeats, command.warmup, command.workers,
        command.seed,
    )  # fmt: skip
    device = choose_device(command.device)
    if command.chart is not None:
        check_chart_path(command.chart)
    most = max(batch for _, batch in config.cases)
    found = None
    if command.data is not None:
        found = open_images(command.data, command.category, command.layout, most, command.seed)
    options: dict[str, Any] = {"dtype": command.dtype, "compile": command.compile}
    if command.backbone != "gabor":
        options |= {"weights": command.weights, "seed": command.seed}
    backbone = create_backbone(command.backbone, command.levels, **options).to(device)
    rows: list[Row] = []
    _write_bench(command, config, rows)
    meter = ThroughputMeter(backbone, config, device, impl=command.impl, matmul_precision=command.matmul_precision)
    _print_bench_head(command, config, device)
    if found is not None:
        _print_left_out(found)
    with tempfile.TemporaryDirectory(prefix="fastbgad-bench-") as scratch:
        generated: dict[int, BenchImages] = {}
        told = ""
        for number, (side, batch) in enumerate(config.cases, start=1):
            images = found
            if images is None:
                file_side = side if command.file_size is None else command.file_size
                if file_side not in generated:
                    generated[file_side] = generate_images(Path(scratch), file_side, command.seed)
                images = generated[file_side]
            with console.pass_bar(f"{side} px, batch {batch} ({number} of {len(config.cases)})") as on_pass:
                row = meter.row(side, batch, images, on_pass)
            rows.append(row)
            _write_bench(command, config, rows)
            if row.images != told:
                told = row.images
                print(f"images: {told}")
            if row.failed is None:
                console.print_table(row.title, *row.table())
            else:
                print(f"{row.title}: failed: {row.failed}", flush=True)
    if command.chart is not None and any(row.failed is None for row in rows):
        write_throughput_chart(command.chart, rows)
        print(f"chart: {command.chart}")
    if command.json is not None:
        print(f"figures: {command.json}")
    return 2 if any(row.failed for row in rows) else 0


def _print_bench_head(command: Bench, config: ThroughputConfig, device: torch.device) -> None:
    here, found = machine(), versions()
    packages = ", ".join(f"{name} {found[name]}" for name in ("fastbgad", "python", "torch", "timm", "triton"))
    print(
        f"{here['processor']}, {here['cores']} cores, {here['torch threads']} torch threads, GPU: {here['gpu']}; "
        f"{packages}; {command.backbone} {command.dtype} on {device}; for every row {config.warmup} whole passes to "
        f"warm up, then {config.timed_passes} timed ones, whose medians are shown",
        flush=True,
    )


def _print_left_out(images: BenchImages) -> None:
    if images.skipped:
        listed = "\n".join(f"  - {message}" for message in images.skipped[:20])
        more = f"\n  ... and {len(images.skipped) - 20} more" if len(images.skipped) > 20 else ""
        print(f"left out because they cannot be read ({len(images.skipped)}):\n{listed}{more}")


def _write_bench(command: Bench, config: ThroughputConfig, rows: Sequence[Row]) -> None:
    """The figures so far: whatever stops the command, those of the finished rows are there."""
    if command.json is None:
        return
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(command).items()}
    content = {
        "machine": machine(),
        "versions": versions(),
        "settings": settings | {"repeats": config.timed_passes},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [row.as_dict() for row in rows],
    }
    write_json(command.json, content)
