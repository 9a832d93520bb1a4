"""Phrases that messages share, and the errors that are made of them."""

from __future__ import annotations

import os
from typing import Literal

import pytest

from fastbgad.errors import BackboneError, ConfigError, DatasetProblemsError, check_choice
from fastbgad.wording import bullets, count, did_you_mean, duration, first_line, listed, printable


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (119, "119 s"), (120, "2 min"), (3700, "1 h 1 min"), (90000, "1 d 1 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("error", "text"), [(OSError(" a\nb"), "a"), (EOFError(), "EOFError"), (ValueError("  "), "ValueError")]
)
def test_first_line_of_an_error(error: Exception, text: str) -> None:
    assert first_line(error) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 cells"), (1, "1 cell"), (2, "2 cells")])
def test_counts(number: int, text: str) -> None:
    assert count(number, "cell") == text
    assert count(number, "anomaly", "anomalies").partition(" ")[2] == ("anomaly" if number == 1 else "anomalies")


@pytest.mark.parametrize(
    ("most", "total", "text"), [(3, None, "a, b, c"), (2, None, "a, b, and 1 more"), (3, 5, "a, b, c, and 2 more")]
)
def test_lists_say_what_they_leave_out(most: int, total: int | None, text: str) -> None:
    assert listed(["a", "b", "c"], most, total=total) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (os.fsdecode(b"k\xe4rn0.png"), "k\\xe4rn0.png"),
        ("\udc80\udcff", "\\x80\\xff"),
        ("\ud800 \udc00 \udfff", "\\ud800 \\udc00 \\udfff"),
        ("Kärn \U0001f600 \\xe4", "Kärn \U0001f600 \\xe4"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    shown.encode()


def test_bullets() -> None:
    assert bullets(["a\nb", "c", "d"], 2) == "  - a\n    b\n  - c\n  ... and 1 more"
    assert bullets(["a"], total=4) == "  - a\n  ... and 3 more"
    assert bullets(["a"]) == "  - a"


def test_names_that_are_nearly_right() -> None:
    assert did_you_mean("scerw", ["screw", "grid"]) == "did you mean screw? "
    assert did_you_mean("nothing", ["screw", "grid"]) == ""


def test_check_choice() -> None:
    check_choice("layout", "mvtec", Literal["mvtec", "btad"])
    check_choice("layout", "mvtec", ("mvtec", "btad"))
    with pytest.raises(ConfigError, match="layout is 'x'; choose one of mvtec, btad"):
        check_choice("layout", "x", Literal["mvtec", "btad"])
    with pytest.raises(BackboneError, match="dtype is 'x'; choose one of float32"):
        check_choice("dtype", "x", {"float32": 1}, BackboneError)


def test_dataset_problems_are_cut_in_the_message_only() -> None:
    error = DatasetProblemsError("folder", [f"file {i}" for i in range(25)])
    assert str(error).startswith("25 problems in the dataset folder:\n  - file 0\n")
    assert str(error).endswith("\n  ... and 5 more")
    assert len(error.problems) == 25
