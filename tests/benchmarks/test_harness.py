"""What every benchmark goes through: which contenders are timed, and what is kept of them."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import harness
import pytest
from harness import Comparison, Contender, SkippedError, machine_kind, measure, stamped, table, tracked

from tests import ROOT


class Calls:
    """Contenders that do nothing, and how often each was called."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def contender(self, name: str, error: float | None = 0.0, **options: Any) -> Callable[[], Contender]:
        """One with this error, found by a call of its own as in the benchmarks; None for one that is the measure."""
        self.of[name] = 0

        def call() -> None:
            self.of[name] += 1

        def check() -> float:
            call()
            assert error is not None
            return error

        return lambda: Contender(call, None if error is None else check, **options)


def raising(problem: Exception) -> Callable[[], Contender]:
    def prepare() -> Contender:
        raise problem

    return prepare


def comparison(contenders: dict[str, Callable[[], Contender]], **options: Any) -> Comparison:
    return Comparison(
        "counting, 3 rows", "base", contenders, **{"rounds": 3, "warmup": 1, "ours": ("ours",), **options}
    )


def test_right_contenders_are_timed_in_every_round() -> None:
    calls = Calls()
    contenders = {"base": calls.contender("base", None), "ours": calls.contender("ours", 1e-3, tolerance=1e-3)}
    result = measure(comparison(contenders, images=8, sizes={"rows": 3}))
    assert calls.of == {"base": 4, "ours": 5}  # warm-up and three rounds; one call more to check
    entry = result["contenders"]["ours"]
    assert entry["error"] == 1e-3
    assert 0 < entry["fastest_ms"] <= entry["median_ms"]
    assert entry["speed"] == pytest.approx(result["contenders"]["base"]["median_ms"] / entry["median_ms"])
    assert entry["images_per_s"] == pytest.approx(8e3 / entry["median_ms"])
    assert result["contenders"]["base"]["speed"] == 1
    assert (result["name"], result["sizes"], result["rounds"]) == ("counting, 3 rows", {"rows": 3}, 3)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("error", [2e-3, float("inf"), float("nan")])
def test_contender_that_differs_is_never_timed(error: float) -> None:
    calls = Calls()
    contenders = {"base": calls.contender("base"), "ours": calls.contender("ours", error, tolerance=1e-3)}
    result = measure(comparison(contenders))
    assert calls.of == {"base": 5, "ours": 1}
    assert result["contenders"]["ours"] == {"failed": f"differs from the oracle by {error:.1e}, more than 1e-03"}
    assert "median_ms" in result["contenders"]["base"]


def test_contender_that_raises_is_failed_and_costs_the_others_nothing() -> None:
    calls = Calls()

    def check() -> float:
        raise ValueError("shapes differ\nand more that a table has no place for")

    contenders = {
        "ours": raising(RuntimeError("out of memory")),
        "other": lambda: Contender(lambda: pytest.fail("it was timed"), check),
        "base": calls.contender("base"),
    }
    entries = measure(comparison(contenders))["contenders"]
    assert entries["ours"] == {"failed": "RuntimeError: out of memory"}
    assert entries["other"] == {"failed": "ValueError: shapes differ"}
    assert entries["base"]["speed"] == 1


def test_skipped_contender_keeps_its_reason() -> None:
    contenders = {"base": Calls().contender("base"), "ours": raising(SkippedError("it needs a GPU"))}
    assert measure(comparison(contenders))["contenders"]["ours"] == {"skipped": "it needs a GPU"}


@pytest.mark.parametrize(
    "prepare", [raising(SkippedError("absent")), Calls().contender("base", 1.0)], ids=["skipped", "wrong"]
)
def test_without_its_baseline_a_comparison_has_times_but_no_speeds(prepare: Callable[[], Contender]) -> None:
    made = comparison({"base": prepare, "ours": Calls().contender("ours")})
    result = measure(made)
    assert "median_ms" in result["contenders"]["ours"]
    assert "speed" not in result["contenders"]["ours"]
    assert tracked(made, result) is None
    table(result)


def test_only_some_contenders_are_prepared() -> None:
    calls = Calls()
    contenders = {"base": calls.contender("base"), "dear": calls.contender("dear"), "ours": calls.contender("ours")}
    result = measure(comparison(contenders), only=("base", "ours"))
    assert list(result["contenders"]) == ["base", "ours"]
    assert calls.of["dear"] == 0
    assert calls.of["base"] == calls.of["ours"] > 0


def test_a_part_of_the_work_counts_as_often_as_it_is_contained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "interleaved", lambda calls, *_: {name: [0.5, 0.25, 1.0] for name in calls})
    contenders = {"base": Calls().contender("base", scale=100), "ours": Calls().contender("ours")}
    entries = measure(comparison(contenders))["contenders"]
    assert (entries["base"]["median_ms"], entries["base"]["fastest_ms"]) == (50_000, 25_000)
    assert entries["ours"]["speed"] == 100


def test_memory_is_measured_in_calls_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for peak_bytes, peak_mib in ((3 * 2**20, 3), (None, None)):
        monkeypatch.setattr(harness, "peak_bytes", lambda call, device, peak=peak_bytes: (call(), peak)[1])
        calls = Calls()
        entry = measure(comparison({"base": calls.contender("base")}, memory=True))["contenders"]["base"]
        assert calls.of["base"] == 6  # once for the error, 1 + 3 times for the clock, once for memory
        assert entry["peak_mib"] == peak_mib
    assert "peak_mib" not in measure(comparison({"base": calls.contender("base")}))["contenders"]["base"]


def test_tracked_is_the_last_of_ours_that_was_timed() -> None:
    calls = Calls()
    contenders = {
        "base": calls.contender("base"),
        "kernels": raising(SkippedError("no GPU")),
        "portable": calls.contender("portable"),
        "first": calls.contender("first"),
        "wrong": calls.contender("wrong", 1.0),
    }
    for ours, expected in [
        (("first", "portable", "wrong", "kernels"), "portable"),
        (("portable", "first"), "first"),
        (("wrong", "kernels", "not there"), None),
    ]:
        made = comparison(contenders, ours=ours)
        assert tracked(made, measure(made)) == expected


def test_table_names_every_contender_and_why_it_has_no_figures() -> None:
    contenders = {
        "base": Calls().contender("base"),
        "ours": Calls().contender("ours", 0.5, tolerance=0.1),
        "kernels": raising(SkippedError("no GPU here")),
    }
    lines = table(measure(comparison(contenders))).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[:4]] == ["contender", "base", "ours", "kernels"]
    assert "1.00x" in lines[1]
    assert "failed: differs from the oracle by 5.0e-01" in lines[2]
    assert "skipped: no GPU here" in lines[3]
    assert "'base', 3 interleaved rounds" in lines[4]


def test_machine_kind_is_a_file_name() -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", machine_kind())


def test_stamp_says_when_with_what_and_where() -> None:
    stamp = stamped({"name": "counting"})
    assert stamp["name"] == "counting"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", stamp["date"])
    assert stamp["versions"]["torch"] == metadata.version("torch")
    assert stamp["commit"]
    assert stamp["machine"] == harness.where()
    json.dumps(stamp)


# Prints where pytest catches it.
QUIET: Any = SimpleNamespace(disabled=nullcontext)


class FakeBenchmark:
    """As much of pytest-benchmark's fixture as `run` needs."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.timed: list[Callable[[], object]] = []

    def pedantic(self, call: Callable[[], object], **_: int) -> None:
        self.timed.append(call)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What this test recorded."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(harness, "recorded", found)
    return found


def test_run_prints_records_and_hands_ours_on(recorded: list, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = FakeBenchmark()
    made = comparison({"base": Calls().contender("base"), "ours": Calls().contender("ours")}, images=2)
    result = harness.run(made, benchmark, QUIET)
    assert table(result) in capsys.readouterr().out
    assert len(benchmark.timed) == 1
    assert benchmark.extra_info["contenders"] == result["contenders"]
    assert [entry["name"] for entry in recorded] == ["counting, 3 rows"]
    assert "commit" in recorded[0]


def test_run_fails_after_it_recorded_where_ours_is_wrong(recorded: list) -> None:
    made = comparison({"base": Calls().contender("base"), "ours": Calls().contender("ours", 1.0)})
    with pytest.raises(pytest.fail.Exception, match="ours: differs from the oracle"):
        harness.run(made, FakeBenchmark(), QUIET)
    assert "failed" in recorded[0]["contenders"]["ours"]


def test_run_is_skipped_where_none_of_ours_takes_part(recorded: list) -> None:
    made = comparison({"base": Calls().contender("base"), "ours": raising(SkippedError("no GPU"))})
    with pytest.raises(pytest.skip.Exception):
        harness.run(made, FakeBenchmark(), QUIET)
    assert len(recorded) == 1


@pytest.fixture
def conftest(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/conftest.py under a name of its own: there is one of tests/ as well."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", ROOT / "benchmarks" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def session(save: bool) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(getoption={"--save-results": save}.__getitem__))


def test_results_are_kept_by_name(
    conftest: ModuleType, recorded: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    path = tmp_path / "results" / f"{machine_kind()}.json"

    recorded[:] = [{"name": "b", "rounds": 1}, {"name": "c", "rounds": 1}]
    conftest.pytest_sessionfinish(session(save=False))
    assert not path.parent.exists()
    conftest.pytest_sessionfinish(session(save=True))
    recorded[:] = [{"name": "c", "rounds": 2}, {"name": "a", "rounds": 2}]
    conftest.pytest_sessionfinish(session(save=True))

    kept = json.loads(path.read_text())
    assert [(entry["name"], entry["rounds"]) for entry in kept] == [("a", 2), ("b", 1), ("c", 2)]


def test_no_results_leave_the_file_alone(
    conftest: ModuleType, recorded: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    conftest.pytest_sessionfinish(session(save=True))
    assert not list(tmp_path.iterdir())


def write(folder: Path, losses: str, utilities: str) -> str:
    """A checkout that has these two files."""
    for name, content in {"losses/losses.py": losses, "utils/utils.py": utilities}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return str(folder)


LOSSES = (
    "def get_logp_boundary(): pass\n"
    "def calculate_bg_spp_loss(): pass\n"
    "def normal_fl_weighting(): pass\n"
    "def abnormal_fl_weighting(): pass\n"
)
UTILITIES = "def get_logp(): return 7\ndef calculate_pro_metric(): pass\n"


def test_official_functions_come_from_the_checkout(tmp_path: Path) -> None:
    from official import load

    assert load(write(tmp_path, LOSSES, UTILITIES)).log_likelihood() == 7


@pytest.mark.parametrize(
    ("losses", "utilities", "message"),
    [
        (LOSSES, "import a_package_that_is_nowhere\n", "utils.py needs a_package_that_is_nowhere"),
        (LOSSES, "def get_logp(): pass\n", "utils.py has no function calculate_pro_metric"),
        ("def broken(:\n", UTILITIES, "losses.py cannot be imported"),
    ],
    ids=["no package", "no function", "not Python"],
)
def test_incomplete_official_checkout_is_skipped(tmp_path: Path, losses: str, utilities: str, message: str) -> None:
    from official import load

    with pytest.raises(SkippedError, match=message):
        load(write(tmp_path, losses, utilities))


def test_missing_official_checkout_is_skipped(tmp_path: Path) -> None:
    from official import load

    with pytest.raises(SkippedError, match=r"no file .*losses\.py; --official takes a checkout"):
        load(str(tmp_path / "nowhere"))
