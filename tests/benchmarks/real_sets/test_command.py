"""The command `benchmarks/real.py`: what it runs, how it resumes, and what it says of failures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import real
from real_sets import bench, command, work
from real_sets.results import collect

from fastbgad.errors import BackendError, InterruptedTraining
from fastbgad.experiments.running.claims import Claims
from tests.make_data import make_mvtec

BENCHMARKS = Path(real.__file__).parent
SMALL = ["--image-size", "64", "--seeds", "0", "--features", "gabor"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_mvtec(tmp_path / "data" / "set", "nut", normals=3, per_type=2, size=64)
    return tmp_path / "data"


def run(data: Path, *arguments: str, out: str = "out") -> int:
    return real.main(["--data", str(data), "--out", str(data.parent / out), *SMALL, *arguments])


def results(data: Path, out: str = "out") -> dict[str, dict[str, Any]]:
    folder = data.parent / out
    return {str(p.relative_to(folder)): json.loads(p.read_text()) for p in sorted(folder.glob("*/*/*-seed*.json"))}


def test_a_run_of_everything_that_takes_gabor_features(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--dry-run") == 0
    assert capsys.readouterr().out.endswith(f"4 of 4 runs are missing in {data.parent / 'out'}\n")
    assert run(data) == 0
    said = capsys.readouterr().out
    assert "[4 of 4] nut: Gaussian per level (gabor, 64 px), seed 0: image " in said
    assert "left out: EfficientAD-S: anomalib downloads" in said
    found = results(data)
    names = [f"nut/gabor-64-demo/{name}-seed0.json" for name in ("bgad", "bgad_without", "nfad")]
    assert list(found) == [*names, "nut/gabor-64-once/gaussian-seed0.json"]
    for path, kept in found.items():
        assert kept["images"] == {
            "normals": 3,
            "known": 2,
            "known_used": 2 if "bgad-" in path else 0,
            "test_normal": 2,
            "test_anomalous": 2,
        }
        assert all(0 <= value <= 1 for value in kept["metrics"].values())
        assert kept["training_seconds"] > 0
        assert kept["scoring_seconds"] > 0
        assert kept["facts"]["threads"] == 1
        assert (kept["decision"] is None) == ("gaussian" in path)
        assert path.replace(".json", ".npz") in [
            str(p.relative_to(data.parent / "out")) for p in (data.parent / "out").rglob("*.npz")
        ]
    assert not any(kept["points"] for kept in found.values())


def test_resume_does_what_is_missing_or_damaged(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ("--methods", "nfad", "gaussian")
    assert run(data, *methods) == 0
    paths = [data.parent / "out" / name for name in results(data)]
    before = [path.read_text() for path in paths]
    capsys.readouterr()
    assert run(data, *methods) == 0
    assert "done: 0 runs" in capsys.readouterr().out
    assert [path.read_text() for path in paths] == before
    paths[1].write_text("{")
    assert run(data, *methods) == 0
    said = capsys.readouterr().out
    assert f"damaged, done again: {paths[1]} is no result of this command" in said
    assert "done: 1 runs" in said
    assert paths[0].read_text() == before[0]
    again, first = (json.loads(text) for text in (paths[1].read_text(), before[1]))
    assert again["metrics"] == first["metrics"]
    # A result that lies in the place of another.
    paths[1].write_text(before[0])
    assert run(data, *methods) == 0
    assert "holds the result of another run" in capsys.readouterr().out
    assert json.loads(paths[1].read_text())["run"]["method"] == "gaussian"


def test_two_processes_share_the_runs(data: Path) -> None:
    make_mvtec(data / "set", "bolt", normals=3, per_type=2, size=64, seed=1)
    command_line = [sys.executable, str(BENCHMARKS / "real.py"), "--data", str(data), "--out", str(data.parent / "out")]
    chosen = [*SMALL, "--methods", "nfad", "gaussian", "--threads", "1"]
    started = [
        subprocess.Popen([*command_line, *chosen], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in started]
    assert [code for *_, code in ends] == [0, 0], ends
    counts = [int(out.split("done: ")[1].split()[0]) for out, *_ in ends]
    assert sum(counts) == len(results(data)) == 4


def test_a_run_that_somebody_else_does_is_left_to_them(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data.parent / "out"
    claim = Claims(out / work.CLAIMS).take("nut__gabor-64-demo__nfad-seed0")
    assert claim is not None
    with claim:
        assert run(data, "--methods", "nfad", "gaussian") == 0
    assert list(results(data)) == ["nut/gabor-64-once/gaussian-seed0.json"]
    assert "1 more are being done by other processes" in capsys.readouterr().out
    assert run(data, "--methods", "nfad") == 0
    assert len(results(data)) == 2


def test_a_failing_peer_and_an_unreadable_set_are_named(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = make_mvtec(data / "set", "zip", size=64)
    (broken / "train" / "good" / "000.png").write_bytes(b"no image")

    def failing(*_: Any, **__: Any) -> None:
        raise BackendError("anomalib could not run CFA on nut")

    monkeypatch.setattr(bench, "run_peer", failing)
    chosen = ("--features", "lite0", "--weights", "random", "--methods", "cfa", "gaussian", "--peer-epochs", "1")
    assert run(data, *chosen) == 1
    assert list(results(data)) == ["nut/lite0-64-once/gaussian-seed0.json"]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "failed: nut: CFA (lite0, 64 px, 1 epochs), seed 0: anomalib could not run CFA on nut"
    assert said[1].startswith("failed: zip with lite0: ")
    assert "000.png" in said[1]
    assert len(said) == 2
    monkeypatch.undo()
    (data / "set" / "zip" / "train" / "good" / "000.png").unlink()
    assert run(data, "--features", "lite0", "--weights", "random", "--methods", "padim", "gaussian") == 0
    assert [path for path in results(data) if "padim" in path] == [
        "nut/lite0-64-once/padim-seed0.json",
        "zip/lite0-64-once/padim-seed0.json",
    ]


def test_convergence(data: Path) -> None:
    assert run(data, "--convergence", "--passes", "4") == 0
    kept = results(data)["nut/gabor-64-convergence/bgad-seed0.json"]
    assert [point["passes"] for point in kept["points"]] == [2, 4]
    assert 0 < kept["points"][0]["seconds"] < kept["points"][1]["seconds"] <= kept["training_seconds"] + 0.01
    # The last point is the finished training.
    for metric in ("image_auroc", "pixel_auroc", "aupro"):
        assert kept["points"][1][metric] == pytest.approx(kept["metrics"][metric], abs=1e-5)


def test_ctrl_c_ends_the_command(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise InterruptedTraining("interrupted")

    monkeypatch.setattr(bench, "fit", interrupted)
    assert run(data, "--methods", "gaussian", "nfad", "bgad") == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert [result.run.method for result in collect(data.parent / "out")[0]] == ["gaussian"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "fastflow"], "there is no method 'fastflow'; choose from nfad"),
        (["--categories", "screw"], "there is no category 'screw'; choose from nut"),
        (["--only", "nothing"], "no run fits"),
        (["--peer-epochs", "0"], "--peer-epochs and --passes at least 1"),
    ],
)
def test_choices_that_do_not_fit(
    data: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert real.main(["--out", str(tmp_path)]) == 2
    assert "say --data DIR" in capsys.readouterr().err
    assert real.main(["--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "no category was found" in capsys.readouterr().err
    assert command.LEFT_OUT.keys() == {"efficientad"}
