"""What the terminal shows of long work."""

from __future__ import annotations

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
