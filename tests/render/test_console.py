"""What the terminal shows of long work."""

from __future__ import annotations

import io
import re

import pytest

from fastbgad.render import console


def test_the_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 40.0, 60.0, 70.0])
    monkeypatch.setattr("fastbgad.render.console.time.perf_counter", lambda: next(clock))
    pace = console._Pace(10)
    # 4 were there from an earlier command, and say nothing of the pace of this one
    assert [pace.left(4), pace.left(4)] == ["", ""]
    assert pace.left(6) == "about 80 s left"
    assert pace.left(6) == "about 60 s left"
    assert pace.left(10) == ""


class Terminal(io.StringIO):
    """Text written to a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue()).splitlines()


def in_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stdout a terminal. No fixture: pytest replaces stdout between those and the test."""
    written = Terminal()
    monkeypatch.setattr("sys.stdout", written)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    return written


def test_columns_are_folded_at_the_width_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_terminal(monkeypatch)
    rows = [("a", 1, "some words " * 8), ("[b]long", 22, "\udcff")]
    console.print_columns(rows, ("name", "n", "text"), right=(1,))
    printed = terminal.lines()
    assert len(printed) > 4
    assert max(map(len, printed)) <= 40
    assert printed[0].split() == ["name", "n", "text"]
    assert printed[1].startswith("  a         1  some words some")
    assert printed[-1].split() == ["[b]long", "22", "\\xff"]


def test_columns_are_not_folded_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_columns([("a", "some words " * 8), ("b", "")])
    assert capsys.readouterr().out.splitlines() == ["  a  " + ("some words " * 8).strip(), "  b"]


def test_the_bar_of_a_check_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_terminal(monkeypatch)
    with console.check_bar("bottle") as on_files:
        for done in range(1, 4):
            on_files(done, 3)
    assert "bottle · images" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # which erases the line
