"""All tables and all sweeps end to end on the miniature, with the paper's ten known anomalies: nothing is replaced."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fastbgad.__main__ import main
from fastbgad.experiments.plan.protocol import names, sweep_names, table_names
from fastbgad.experiments.plan.published import RUNNABLE, published
from tests.miniature import make_miniature

OPTIONS = [
    "--backbone", "gabor", "--image-size", "64", "64", "--preset", "demo", "--schedule.meta-epochs", "2",
    "--schedule.sub-epochs", "1", "--anomalies.cut-paste", "1", "--seeds", "1", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all tables; then sweeps on one category on top of it."""
    root = tmp_path_factory.mktemp("reproduce")
    make_miniature(root / "data", per_type=11)
    assert run(root, table_names()) == 0
    (root / "out" / "reproduce.html").rename(root / "tables.html")
    assert run(root, sweep_names(), "--categories", "transistor") == 0
    return root


def run(root: Path, plans: Sequence[str], *more: str) -> int:
    arguments = ["--data", str(root / "data"), "--out", str(root / "out")]
    return main(["reproduce", *plans, *arguments, *OPTIONS, *more])


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "out" / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", table_names())
def test_every_published_number_of_a_runnable_method_has_ours_beside_it(folder: Path, name: str) -> None:
    rows = {(r["setting"], r["row"], r["method"], r["metric"], r["selection"]): r for r in rows_of(folder, name)}
    for cell in published(name):
        if cell.method not in RUNNABLE or cell.method in ("PaDiM", "PatchCore", "CFA", "DRAEM"):
            assert (cell.setting, cell.row, cell.method, cell.metric, "last") not in rows
            row = rows[cell.setting, cell.row, cell.method, cell.metric, "published only"]
            assert float(row["published"]) == cell.value
            assert row["ours"] == ""
            continue
        for selection in ("last", "best"):
            row = rows[cell.setting, cell.row, cell.method, cell.metric, selection]
            ours = float(row["ours"])
            assert 0.5 < ours <= 1
            assert row["cells"] == row["cells_planned"] != "0"
            assert float(row["difference"]) == pytest.approx(ours - cell.value, abs=1e-9)
    best = {key[:-1]: float(r["ours"]) for key, r in rows.items() if key[-1] == "best" and r["ours"]}
    last = {key[:-1]: float(r["ours"]) for key, r in rows.items() if key[-1] == "last" and r["ours"]}
    assert best.keys() == last.keys()
    assert all(best[key] >= last[key] for key in best)


def test_a_mean_is_that_of_the_cells_in_the_ledger(folder: Path) -> None:
    kept = [json.loads(path.read_text()) for path in (folder / "out" / "cells").glob("*.json")]
    usual = [
        result["last"]["aupro"]
        for result in kept
        if (result["cell"]["dataset"], result["cell"]["method"]) == ("mvtec", "bgad")
        and result["cell"]["known_types"] is result["cell"]["test_types"] is None
        and result["cell"]["num_anomalies"] == 10
        and not result["cell"]["overrides"]
    ]
    assert len(usual) == 15
    rows = rows_of(folder, "unsupervised_vs_bgad")
    (mean,) = (
        r for r in rows if (r["row"], r["method"], r["metric"], r["selection"]) == ("mean", "BGAD", "aupro", "last")
    )
    assert float(mean["ours"]) == pytest.approx(statistics.fmean(usual))
    # ten known anomalies left the test set, and those of BGAD and NFAD are the same
    names_of = {
        result["cell"]["method"]: result["known_anomalies"]
        for result in kept
        if result["cell"]["category"] == "screw" and result["cell"]["known_types"] == ["scratch_head"]
    }
    assert set(names_of) >= {"nfad", "bgad", "bgad_dagger"}
    assert len(set(map(tuple, names_of.values()))) == 1
    assert len(names_of["bgad"]) == 10
    assert all(name.startswith("scratch_head/") for name in names_of["bgad"])


@pytest.mark.parametrize("name", sweep_names())
def test_every_value_of_a_sweep_was_run(folder: Path, name: str) -> None:
    rows = [row for row in rows_of(folder, name) if row["selection"] == "last"]
    assert len({row["value"] for row in rows}) > 1
    assert {row["metric"] for row in rows} == {"image_auroc", "pixel_auroc", "aupro"}
    assert all(0.5 < float(row["ours"]) <= 1 for row in rows)
    bgad = {row["value"]: row["ours"] for row in rows if row["method"] == "bgad" and row["metric"] == "pixel_auroc"}
    if len(bgad) > 1:
        assert len(set(bgad.values())) > 1  # the option reached the training


def test_the_files_that_people_read(folder: Path) -> None:
    out = folder / "out"
    for name in names():
        assert r"\begin{tabular}" in (out / "tables" / f"{name}.tex").read_text()
        assert list((out / "charts").glob(f"{name}-*.svg"))
    page = (folder / "tables.html").read_text()
    assert page.count("data:image/jpeg") >= 4 * 15
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "Best on test" in page
    assert (out / "qualitative.png").stat().st_size > 10_000
    manifest = json.loads((out / "manifest.json").read_text())
    assert "versions" in json.dumps(manifest)
    pictures = list((out / "pictures").glob("*.npz"))
    shown = {tuple(path.name.split("-")[:3]) for path in pictures}
    assert len(shown) == 2 * 18  # NFAD and BGAD on every category
    assert all(np.load(path)["maps"].ndim == 3 for path in pictures[:2])


def test_the_same_command_runs_nothing_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = {path: path.stat().st_mtime_ns for path in (folder / "out" / "cells").iterdir()}
    assert run(folder, ["btad", "one_class"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "out" / "cells").iterdir()} == cells
    assert "0 trainings to run" in capsys.readouterr().out
