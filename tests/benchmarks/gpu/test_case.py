"""Contenders: what is right is timed, whatever is wrong with the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu.case import Case, Contender, SkippedError, measure
from benchmarks.gpu.context import Context


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("interpreter", tmp_path, tiny=True)


def never() -> Contender:
    raise RuntimeError("no such instruction\nsecond line")


def absent() -> Contender:
    raise SkippedError("not here")


def case() -> Case:
    contenders = {
        "base": lambda: Contender(lambda: [torch.ones(3)]),
        "fastbgad wrong": lambda: Contender(lambda: [torch.ones(3) * 1.1]),
        "fastbgad nan": lambda: Contender(lambda: [torch.full((3,), float("nan"))]),
        "fastbgad broken": never,
        "absent": absent,
        "fastbgad right": lambda: Contender(lambda: [torch.ones(3)]),
    }
    return Case("case", lambda: [torch.ones(3, dtype=torch.float64)], contenders, 1e-3)


def test_a_contender_that_differs_is_not_timed(context: Context) -> None:
    found = measure(case(), context, {})
    entries = found["contenders"]
    assert found["outcome"] == "wrong"
    assert "differs from the reference by 1.0e-01" in entries["fastbgad wrong"]["failed"]
    assert "differs from the reference by inf" in entries["fastbgad nan"]["failed"]
    assert entries["fastbgad broken"]["failed"] == "RuntimeError: no such instruction"
    assert "in never" in entries["fastbgad broken"]["traceback"]
    assert entries["absent"] == {"skipped": "not here"}
    assert {name for name, entry in entries.items() if "median_us" in entry} == {"base", "fastbgad right"}
    assert entries["fastbgad right"]["speed"] > 0


def test_one_that_crashed_before_is_left_out(context: Context) -> None:
    context.item, context.skip = "case", [("case", "fastbgad right")]
    entries = measure(case(), context, {})["contenders"]
    assert "crashed the process" in entries["fastbgad right"]["failed"]
    assert "median_us" in entries["base"]


def test_timing_that_crashed_before_is_not_tried_again(context: Context) -> None:
    """Or the crash would be blamed on one contender after the other."""
    context.item, context.skip = "case", [("case", "timing")]
    found = measure(case(), context, {})
    assert found["outcome"] == "wrong"
    assert "timing crashed the process" in found["contenders"]["fastbgad right"]["failed"]
    assert not any("median_us" in entry for entry in found["contenders"].values())
    assert found["contenders"]["fastbgad right"]["relative_error"] == 0


def test_a_spoiled_device_ends_the_process(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later contender would fail too: another process takes them."""
    monkeypatch.setattr(Context, "spoiled", lambda self: True)
    with pytest.raises(RuntimeError, match="no such instruction"):
        measure(case(), context, {})
    assert context.step == "fastbgad broken"


def test_floor(context: Context) -> None:
    """Whichever of arithmetic and traffic takes longer, in microseconds."""
    timed = case()
    timed.flops, timed.bytes = 2_000_000, 1000
    limits = {"matrix_flops_per_second": 1e12, "copy_bytes_per_second": 1e9}
    found = measure(timed, context, limits)
    assert found["floor_us"] == 2.0
    entry = found["contenders"]["base"]
    assert entry["fraction_of_floor"] == pytest.approx(2.0 / entry["median_us"])


def test_context_travels_as_json(context: Context) -> None:
    context.skip, context.only, context.tiles = [("a", "b")], ["x"], "tiles.json"
    assert Context.from_json(context.as_json()) == context
