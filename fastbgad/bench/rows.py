"""Rows of throughput measurements and their stages, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Mode = Literal["throughput", "latency"]

_NONE = "-"


@dataclass(frozen=True)
class Stage:
    """Time and memory of one stage, per image: medians over the passes, divided by the images of a batch."""

    ms_per_image: float | None  # None: there is no such stage on this device
    share: float = 0.0  # of the sum of all stages
    peak_mib: float | None = None  # beyond what is held before it; None: not known here
    p99_ms: float | None = None  # of latency
    channels: int | None = None  # of a flow
    rows: int | None = None  # of a flow, per image
    copy_fraction: float | None = None  # on a GPU: bytes that must be moved, against a plain copy in the same time
    matrix_fraction: float | None = None  # on a GPU: operations of matrix products, against a plain product

    @property
    def images_per_s(self) -> float | None:
        """Images per second of this stage alone."""
        return 1e3 / self.ms_per_image if self.ms_per_image else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; those of latency, flows and GPUs only where there are any."""
        values: dict[str, Any] = {
            "ms_per_image": self.ms_per_image,
            "images_per_s": self.images_per_s,
            "share": self.share,
            "peak_mib": self.peak_mib,
        }
        if self.p99_ms is not None:
            values |= {"p50_ms": self.ms_per_image, "p99_ms": self.p99_ms}
        extras = {name: getattr(self, name) for name in ("channels", "rows", "copy_fraction", "matrix_fraction")}
        return values | {name: value for name, value in extras.items() if value is not None}


@dataclass(frozen=True)
class Row:
    """One image size with one batch size.

    The total of a throughput row is the sum of its stages' medians; of a latency row, the median of whole passes.
    """

    image_size: int
    batch_size: int
    mode: Mode
    images: str  # their number and size, and what was done to them
    stages: Mapping[str, Stage] = field(default_factory=dict)
    total: Stage | None = None
    skipped: tuple[str, ...] = ()  # one message per image that could not be used
    failed: str | None = None  # why there are no stages

    @property
    def title(self) -> str:
        """Name of the row in tables and charts."""
        return f"{self.image_size} px, batch {self.batch_size}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "image_size": self.image_size,
            "batch_size": self.batch_size,
            "mode": self.mode,
            "images": self.images,
            "stages": {name: stage.as_dict() for name, stage in self.stages.items()},
            "total": {} if self.total is None else self.total.as_dict(),
            "skipped": list(self.skipped),
            "failed": self.failed,
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and lines for a terminal; values that no stage has get no column."""
        assert self.total is not None
        stages = {**self.stages, "total": self.total}
        on_gpu = any(stage.copy_fraction is not None for stage in stages.values())
        headings = ["stage"]
        headings += ["p50 ms", "p99 ms"] if self.mode == "latency" else ["ms per image", "images/s"]
        headings += ["share", "peak MiB", *(["of copy rate", "of matrix rate"] if on_gpu else [])]
        lines = []
        for name, stage in stages.items():
            second = stage.p99_ms if self.mode == "latency" else stage.images_per_s
            texts = [_label(name, stage), figure_text(stage.ms_per_image), figure_text(second)]
            texts += [_NONE if stage.ms_per_image is None else f"{stage.share:.1%}"]
            texts += [_NONE if stage.peak_mib is None else f"{stage.peak_mib:.1f}"]
            if on_gpu:
                fractions = (stage.copy_fraction, stage.matrix_fraction)
                texts += [_NONE if fraction is None else f"{fraction:.0%}" for fraction in fractions]
            lines.append(texts)
        return headings, lines


def _label(name: str, stage: Stage) -> str:
    return name if stage.channels is None else f"{name} (C = {stage.channels}, {stage.rows} rows)"


def figure_text(value: float | None) -> str:
    """Return a number with three significant digits, or all digits before the point."""
    if value is None:
        return _NONE
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.{2 if value < 10 else 1}f}"
