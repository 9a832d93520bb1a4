"""Results of tuning: the file that the kernels read, and the table for a terminal."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..tile_sizes import CONFIGS, forget, read_json, read_tuned, write_json
from ..triton_version import triton_version
from .measuring import Tiles, Tuned


def store(path: Path, results: Sequence[Tuned], measured_on: Mapping[str, Any]) -> None:
    """Write the results to `path`; other entries of the same GPU stay."""
    content: dict[str, Any] = {"tiles": {}, "microseconds": {}}
    if path.exists():
        read_tuned(path)
        before = read_json(path)
        if before.get("measured_on", {}).get("gpu") == measured_on.get("gpu"):
            content = {key: dict(before.get(key, {})) for key in content}
    for result in results:
        times = {"default": result.default_microseconds, "chosen": round(result.microseconds, 3)}
        content["tiles"].setdefault(result.kernel, {})[result.key] = dict(result.chosen)
        content["microseconds"].setdefault(result.kernel, {})[result.key] = times
    write_json(path, {"measured_on": dict(measured_on), **content})
    forget()


def result_table(results: Sequence[Tuned]) -> str:
    """Return a table for a terminal: default tiles, chosen tiles, microseconds and gain of each case."""
    cells = [("kernel", "default", "us", "chosen", "us", "gain")]
    for result in results:
        before = result.default_microseconds
        cells.append(
            (
                f"{result.kernel} / {result.key}",
                short(result.default),
                "cannot run" if before is None else f"{before:.1f}",
                short(result.chosen),
                f"{result.microseconds:.1f}",
                "-" if before is None else f"{before / result.microseconds:.2f}x",
            )
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in cells)


def short(tiles: Tiles) -> str:
    """Return tile sizes on one line."""
    return " ".join(f"{name}={value}" for name, value in tiles.items())


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the machine that measurements hold for."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": output_of(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index}"
        ),
        "torch": torch.__version__,
        "triton": triton_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": output_of("git", "-C", str(CONFIGS), "rev-parse", "HEAD"),
    }


def output_of(*command: str) -> str | None:
    """Return the output of a command; None where it is not installed or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
