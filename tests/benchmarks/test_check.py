"""`make bench-check`: ratios against stored ones, without timing anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import check
import pytest
from check import Ratio, UnansweredError
from harness import Comparison, Contender

OURS, THEIRS = "fastbgad torch", "FrEIA 0.2 eager"


def comparison(name: str) -> Comparison:
    return Comparison(name, THEIRS, {OURS: lambda: Contender(lambda: None), THEIRS: lambda: Contender(lambda: None)})


def stored(speed: float, band: float = 0.15) -> dict:
    return {"speed": speed, "band": band, "ours": OURS, "against": THEIRS}


def replay(*speeds: float) -> Callable[[Comparison], Ratio]:
    """Stands in for measuring."""
    waiting = iter(speeds)
    return lambda _: Ratio(next(waiting), OURS, THEIRS)


def test_within_the_band_is_measured_once() -> None:
    (verdict,) = check.check([comparison("flow")], {"flow": stored(4.0)}, replay(3.5))
    assert not verdict.slower
    assert verdict.measured == (3.5,)


def test_one_bad_measurement_is_forgiven() -> None:
    (verdict,) = check.check([comparison("flow")], {"flow": stored(4.0)}, replay(3.0, 3.9))
    assert not verdict.slower
    assert verdict.measured == (3.0, 3.9)


def test_two_bad_measurements_in_a_row_fail() -> None:
    verdicts = check.check(
        [comparison("flow"), comparison("loss")], {"flow": stored(4.0), "loss": stored(1.2)}, replay(3.0, 3.1, 1.2)
    )
    assert [verdict.slower for verdict in verdicts] == [True, False]
    assert "SLOWER" in check.line(verdicts[0])


def test_thirty_percent_are_outside_of_every_band() -> None:
    """1 / 1.3 is 23 % less; the widest band that `update` gives is narrower."""
    noisy = check.update([comparison("flow")], replay(4.0, 2.0, 6.0))["flow"]
    assert noisy["band"] == check.LARGEST_BAND
    (verdict,) = check.check([comparison("flow")], {"flow": noisy}, replay(4.0 / 1.3, 4.0 / 1.3))
    assert verdict.slower


def test_update_takes_the_median_and_twice_the_spread() -> None:
    found = check.update([comparison("flow")], replay(4.0, 3.68, 4.1))["flow"]
    assert found == {"speed": 4.0, "band": 0.16, "ours": OURS, "against": THEIRS}
    assert check.update([comparison("flow")], replay(4.0, 4.0, 4.0))["flow"]["band"] == comparison("flow").band


def test_what_is_not_stored_is_not_passed_over() -> None:
    with pytest.raises(UnansweredError, match="no stored ratio for: loss"):
        check.check([comparison("flow"), comparison("loss")], {"flow": stored(4.0)}, replay(4.0))


def test_another_contender_is_not_compared() -> None:
    baseline = {"flow": {**stored(4.0), "ours": "fastbgad triton"}}
    with pytest.raises(UnansweredError, match=r"measured fastbgad torch .* baseline has fastbgad triton"):
        check.check([comparison("flow")], baseline, replay(4.0))


def test_a_contender_that_fails_leaves_the_question_open() -> None:
    wrong = Contender(lambda: None, lambda: 0.5, 1e-3)
    bad = Comparison("flow", THEIRS, {THEIRS: lambda: Contender(lambda: None), OURS: lambda: wrong})
    with pytest.raises(UnansweredError, match="differs from the oracle"):
        check.ratio_of(bad)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(check, "BASELINES", tmp_path)
    monkeypatch.setattr(check, "machine_kind", lambda: "here")
    return tmp_path


def write(path: Path, kind: str, **ratios: dict) -> None:
    path.write_text(json.dumps({"kind": kind, "where": "a machine", "ratios": ratios}))


def test_a_missing_baseline_is_an_error(folder: Path) -> None:
    write(folder / "elsewhere.json", "elsewhere")
    with pytest.raises(UnansweredError, match=r"no baseline .*\(here\).*there are: elsewhere.*make bench-update"):
        check.load_baseline("here", floors=False)


def test_floors_stand_in_loudly(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "any-cpu.json", "any-cpu", flow=stored(1.5))
    assert check.load_baseline("here", floors=True) == {"flow": stored(1.5)}
    assert "NO BASELINE for here" in capsys.readouterr().out
    write(folder / "here.json", "here", flow=stored(4.0))
    assert check.load_baseline("here", floors=True) == {"flow": {**stored(4.0), "band": check.SHARED_MACHINE_BAND}}
    assert check.load_baseline("here", floors=False) == {"flow": stored(4.0)}


def test_a_baseline_of_another_machine_is_refused(folder: Path) -> None:
    write(folder / "here.json", "elsewhere", flow=stored(4.0))
    with pytest.raises(UnansweredError, match="another kind of machine"):
        check.load_baseline("here", floors=False)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kind": "here"}'])
def test_a_damaged_baseline_is_named(folder: Path, content: str) -> None:
    (folder / "here.json").write_text(content)
    with pytest.raises(UnansweredError, match=r"here\.json is damaged"):
        check.load_baseline("here", floors=False)


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """update, check, measure and compare, each with its exit status."""
    speed = 4.0

    def measured(comparison: Comparison, **_: object) -> dict:
        timed = {OURS: {"error": 0.0, "speed": speed}, THEIRS: {"error": 0.0, "speed": 1.0}}
        return {"name": comparison.name, "contenders": timed}

    monkeypatch.setattr(check, "measure", measured)
    monkeypatch.setattr(check, "tracked_comparisons", lambda: [comparison("flow"), comparison("loss")])
    assert check.main(["check"]) == 2
    assert "no baseline" in capsys.readouterr().err
    assert check.main(["update"]) == 0
    assert check.main(["check"]) == 0
    base, head = folder / "base", folder / "head"
    assert check.main(["measure", "--out", str(base)]) == 0
    speed = 4.0 / 1.3
    assert check.main(["check"]) == 1
    assert "slower than the band" in capsys.readouterr().out
    assert check.main(["update", "--only", "loss"]) == 0
    kept = json.loads((folder / "here.json").read_text())["ratios"]
    assert kept["flow"]["speed"] == 4.0
    assert kept["loss"]["speed"] == pytest.approx(speed, abs=1e-3)
    assert check.main(["measure", "--out", str(head)]) == 0
    capsys.readouterr()
    assert check.main(["compare", str(base), str(head), "--markdown"]) == 1
    assert "| flow | 4.00x | 3.08x | -23% SLOWER |" in capsys.readouterr().out
    assert check.main(["compare", str(base), str(base)]) == 0
    assert check.main(["compare", str(base), str(folder / "nothing")]) == 2
    assert "is not a file of ratios" in capsys.readouterr().err
    assert check.main(["check", "--only", "no such"]) == 2
    write(head, "elsewhere", flow=stored(1.0))
    assert check.main(["compare", str(base), str(head)]) == 2
    assert "different kinds of machines" in capsys.readouterr().err


def test_every_tracked_comparison_has_a_stored_ratio() -> None:
    """What is tracked is in every baseline file that is kept, floors included."""
    names = {comparison.name for comparison in check.tracked_comparisons()}
    assert names
    files = sorted((Path(check.__file__).parent / "baselines").glob("*.json"))
    assert "any-cpu" in {path.stem for path in files}
    for path in files:
        missing = names - set(json.loads(path.read_text())["ratios"])
        assert not missing, f"{path.name} lacks {missing}: run make bench-update"
