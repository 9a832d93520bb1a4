"""The command prints any name to any stream."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from fastbgad.__main__ import _let_streams_escape
from fastbgad.render.console import print_table
from tests import ROOT

NAME = os.fsdecode(b"k\xe4rn")


@pytest.mark.parametrize(("encoding", "umlaut"), [("utf-8", "ö"), ("ascii", "\\xf6"), ("latin-1", "ö")])
def test_streams_escape_what_they_cannot_encode(encoding: str, umlaut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    _let_streams_escape()
    print(f"{NAME} ö", file=sys.stderr)
    print(f"{NAME} \ud800 ö")
    assert raw.getvalue().decode(encoding) == f"k\\xe4rn {umlaut}\nk\\xe4rn \\ud800 {umlaut}\n"


def test_streams_of_a_caller_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    _let_streams_escape()
    print(NAME)


def test_a_table_measures_names_as_it_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Names", ("name", "value"), [(NAME, "1"), ("plain", "2")])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert any("k\\xe4rn" in line for line in lines)
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("environment", [{}, {"PYTHONIOENCODING": "ascii"}])
def test_an_error_names_the_file(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "fastbgad", "train", "--data", b"no/k\xe4rn", "--out", b"r\xfcn"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 2
    assert b"no/k\\xe4rn does not exist" in done.stderr
