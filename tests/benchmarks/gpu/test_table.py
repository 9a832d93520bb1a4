"""What a run prints fits 80 columns and hides no trouble."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.table import WIDTH, line, summary


def case(**more: Any) -> dict[str, Any]:
    timed = {"median_us": 1234.5, "speed": 3.2, "relative_error": 1e-6, "peak_bytes": 2**30}
    contenders = {
        "fastbgad triton, levels on streams of one CUDA graph": timed,
        "fastbgad wrong": {"failed": "differs from the reference by 1.0e-01, more than 1e-03 " * 3},
        "FrEIA": {"skipped": "FrEIA is not installed"},
    }
    name = "flow, three levels of a 1024-pixel image"
    return {
        "stage": "headline",
        "item": name,
        "outcome": "measured",
        "seconds": 12.34,
        "contenders": contenders,
        **more,
    }


def test_timings_and_what_is_wrong_with_others() -> None:
    text = line(case())
    assert all(len(row) <= WIDTH for row in text.splitlines()), text
    assert "1234.5 us   3.20x   1024 MiB" in text
    assert "FAILED: differs from the reference by 1.0e-01" in text
    assert "skipped: FrEIA is not installed" in text


def test_a_rehearsal_shows_no_times() -> None:
    """They are those of a CPU, or of nothing."""
    text = line(case(outcome="rehearsed"))
    assert "1234" not in text
    assert "right" in text


def test_summary_counts_and_lists_troubles() -> None:
    crash = {"stage": "smoke", "item": "boundary", "step": "x", "outcome": "crashed", "message": "signal SIGSEGV"}
    kernels = {"stage": "smoke", "item": "a", "outcome": "right", "kernels": {"hits": 3, "compiled": 2}}
    text = summary([kernels, crash, case()])
    assert "smoke      1 right, 1 crashed" in text
    assert "3 found in Triton's cache, 2 compiled" in text
    assert "crashed   boundary (x)" in text
    assert "signal SIGSEGV" in text
