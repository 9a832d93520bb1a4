"""Records survive a run that is killed while it writes, and a result file is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import collect
from benchmarks.gpu.records import RECORDS, RecordError, Records, plain, read_records
from tests import ROOT

DATE = "2026-11-28 10:11 UTC"
HERE = {"commit": "abc1234", "changed_files": False, "source": "s1"}


def test_every_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for number in range(3):
        records.add({"number": number})
        assert [record["number"] for record in read_records(tmp_path / RECORDS)] == list(range(number + 1))


def test_a_line_cut_short_is_left_out_and_swallows_nothing(tmp_path: Path) -> None:
    Records(tmp_path).add({"number": 0})
    with (tmp_path / RECORDS).open("ab") as file:
        file.write(b'{"number": 1, "na')
    assert [record["number"] for record in read_records(tmp_path / RECORDS)] == [0]
    Records(tmp_path).add({"number": 2})
    assert [record["number"] for record in read_records(tmp_path / RECORDS)] == [0, 2]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text('{"number": 0}\n{"num\n{"number": 2}\n')
    with pytest.raises(RecordError, match=r"line 2 .* is damaged"):
        read_records(tmp_path / RECORDS)


def test_what_is_not_json_becomes_text() -> None:
    value = plain({"a": float("nan"), "b": [float("inf"), 1, None, True], "c": Path("x"), "d": (2.5,)})
    assert json.loads(json.dumps(value, allow_nan=False)) == {
        "a": "nan",
        "b": ["inf", 1, None, True],
        "c": "x",
        "d": [2.5],
    }


def entry(median: float, **more: Any) -> dict[str, Any]:
    return {"relative_error": 1e-6, "median_us": median, "low_us": median, "high_us": median, "rounds": 30, **more}


def write_run(folder: Path, *more: dict[str, Any], **run: Any) -> Path:
    """The records of a short run on a GPU."""
    records = Records(folder)
    facts = {
        "date": "2026-11-28 10:11 UTC",
        "measured": True,
        "commit": "unknown",
        "changed_files": None,
        "source": "s1",
    }
    records.add({"stage": "run", "outcome": "begins", **facts, **run})
    machine = {"gpu": "NVIDIA H100 80GB HBM3, 79 GiB"}
    ceilings = {"copy_bytes_per_second": 3e12, "matrix_flops_per_second": 7e14}
    records.add(
        {
            "stage": "smoke",
            "item": "environment",
            "outcome": "right",
            "gpu": "NVIDIA H100 80GB HBM3",
            "driver": "580",
            "machine": machine,
            "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        }
    )
    contenders = {"eager FrEIA": entry(1000.0), "fastbgad triton": entry(100.0, speed=10.0)}
    for name in ("flow, three levels", "boundary, 4096 rows"):
        records.add(
            {
                "stage": "headline",
                "item": name,
                "name": name,
                "outcome": "measured",
                "baseline": "eager FrEIA",
                "contenders": contenders,
                "notes": [],
                "at": 3.0,
                "ceilings": ceilings,
            }
        )
    for record in more:
        records.add(record)
    records.add({"stage": "run", "outcome": "ends", "seconds": 100.0})
    return folder


def test_collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The performance page reads the file; tuned tiles are kept; the newest result of an item counts."""
    import sys

    sys.path.append(str(ROOT / "benchmarks"))
    from page_sources import read_sources

    name = "boundary, 4096 rows"
    again = {
        "stage": "headline",
        "item": name,
        "name": name,
        "outcome": "wrong",
        "baseline": "eager FrEIA",
        "notes": [],
        "contenders": {"eager FrEIA": entry(900.0), "fastbgad triton": {"failed": "it crashed the process"}},
    }
    tests = [
        {"stage": "tests", "item": "tests/ops/boundary/test_registered.py::test_a", "outcome": "right"},
        {
            "stage": "tests",
            "item": "tests/ops/boundary/test_registered.py::test_b",
            "outcome": "failed",
            "message": "no",
        },
    ]
    crash = {"stage": "headline", "item": name, "step": "fastbgad triton", "outcome": "crashed", "message": "SIGSEGV"}
    out = write_run(tmp_path / "out", crash, again, *tests)
    tiles = {"tiles": {"score_map": {"map": {"TH": 4, "TW": 128, "num_warps": 4}}}, "measured_on": {}}
    (out / "tiles.json").write_text(json.dumps(tiles))
    monkeypatch.setattr(collect, "checkout", lambda root: HERE)
    (tmp_path / "configs").mkdir()
    results = tmp_path / "results"
    assert collect.main([str(out), "--results", str(results), "--configs", str(tmp_path / "configs")]) == 0
    (path,) = results.glob("nvidia_h100_80gb_hbm3/*.json")
    assert path.name == "2026-11-28-1011-abc1234.json"
    content = json.loads(path.read_text())
    assert (content["commit"], content["driver"], content["seconds"]) == ("abc1234", "580", 100.0)
    assert content["equivalence"]["boundary"] == {
        "passed": 1,
        "failed": ["tests/ops/boundary/test_registered.py::test_b: no"],
    }
    assert [trouble["outcome"] for trouble in content["troubles"]] == ["crashed", "wrong", "failed"]
    assert json.loads((tmp_path / "configs" / "nvidia_h100_80gb_hbm3.json").read_text()) == tiles
    (source,) = read_sources(results)
    assert [result["name"] for result in source.results] == ["flow, three levels", name]
    assert source.results[0]["contenders"]["fastbgad triton"]["speed"] == 10
    assert "crashed" in source.results[1]["contenders"]["fastbgad triton"]["failed"]
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"measured": False}, "holds a rehearsal"),
        ({"source": "s2"}, "2 versions of the code"),
    ],
)
def test_what_cannot_be_collected(
    tmp_path: Path, run: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    write_run(tmp_path, **run)
    assert collect.main([str(tmp_path), "--results", str(tmp_path / "results")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_nothing_to_collect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect.main([str(tmp_path)]) == 2
    assert "records.jsonl cannot be read" in capsys.readouterr().err
    Records(tmp_path).add(
        {"stage": "run", "outcome": "begins", "measured": True, **HERE, "date": "2026-11-28 10:11 UTC"}
    )
    assert collect.main([str(tmp_path)]) == 2
    assert "does not say which GPU it was" in capsys.readouterr().err
