"""Rows of throughput as tables."""

from __future__ import annotations

from dataclasses import replace

from fastbgad.bench.rows import Row, Stage


def test_tables() -> None:
    stages = {
        "decode": Stage(12.345, 0.25, 3.21),
        "host to device": Stage(None),
        "flow 1": Stage(0.5, 0.75, channels=8, rows=9),
    }
    row = Row(64, 2, "throughput", "", stages, Stage(123.4, 1.0))
    assert row.table() == (
        ["stage", "ms per image", "images/s", "share", "peak MiB"],
        [
            ["decode", "12.3", "81.0", "25.0%", "3.2"],
            ["host to device", "-", "-", "-", "-"],
            ["flow 1 (C = 8, 9 rows)", "0.5", "2000", "75.0%", "-"],
            ["total", "123", "8.10", "100.0%", "-"],
        ],
    )
    latency = replace(row, mode="latency", total=Stage(1.0, 1.0, p99_ms=2.0), stages={})
    assert latency.table()[1] == [["total", "1.00", "2.00", "100.0%", "-"]]
