"""All tables and all sweeps end to end on the miniature, with the paper's ten known anomalies: nothing is replaced."""

from __future__ import annotations

import csv
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fastbgad.__main__ import main
from fastbgad.experiments.plan.protocol import sweep_names, table_names
from fastbgad.experiments.plan.protocol_file import dataset_facts
from fastbgad.experiments.plan.published import RUNNABLE, published
from tests.grids import slow
from tests.miniature import make_miniature

OPTIONS = [
    "--backbone", "gabor", "--image-size", "64", "64", "--preset", "demo", "--schedule.meta-epochs", "2",
    "--schedule.sub-epochs", "1", "--anomalies.cut-paste", "1", "--seeds", "1", "--device", "cpu",
]  # fmt: skip


FEW = {"mvtec": ["carpet", "screw"], "btad": ["01"]}
ALL = {name: list(dataset_facts(name).images) for name in FEW}
FEW_SWEEPS = ["augmentation", "focal", "num_anomalies"]


class Run(NamedTuple):
    """A folder with data sets and results, the categories of the tables by data set, and the names of the sweeps."""

    root: Path
    categories: dict[str, list[str]]
    sweeps: list[str]

    def reproduce(self, plans: Sequence[str], *more: str) -> int:
        arguments = ["--data", str(self.root / "data"), "--out", str(self.root / "out")]
        return main(["reproduce", *plans, *arguments, *OPTIONS, *more])

    def tables(self, plans: Sequence[str]) -> int:
        chosen = itertools.chain(*self.categories.values())
        return self.reproduce(plans, *([] if self.categories is ALL else ["--categories", *chosen]))

    def rows_of(self, name: str) -> list[dict[str, str]]:
        with (self.root / "out" / "tables" / f"{name}.csv").open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=[(FEW, FEW_SWEEPS), slow((ALL, list(sweep_names())))], ids=["few", "all"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All tables; then sweeps on one category on top of them."""
    root = tmp_path_factory.mktemp("reproduce")
    make_miniature(root / "data", per_type=11)
    made = Run(root, *request.param)
    assert made.tables(table_names()) == 0
    (root / "out" / "reproduce.html").rename(root / "tables.html")
    assert made.reproduce(made.sweeps, "--categories", "transistor") == 0
    return made


@pytest.mark.parametrize("name", table_names())
def test_every_published_number_of_a_runnable_method_has_ours_beside_it(run: Run, name: str) -> None:
    rows = {(r["setting"], r["row"], r["method"], r["metric"], r["selection"]): r for r in run.rows_of(name)}
    # The rows of BTAD are "1", "2" and "3", those of a type of anomalies "carpet:color".
    left_out = {c.lstrip("0") for dataset, of in ALL.items() for c in of if c not in run.categories[dataset]}
    for cell in published(name):
        if cell.row.partition(":")[0] in left_out:
            continue
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
            if row["difference"]:
                assert float(row["difference"]) == pytest.approx(ours - cell.value, abs=1e-9)
            else:
                # A mean of fewer categories than the published one is held against nothing.
                assert cell.row == "mean"
                assert left_out
    best = {key[:-1]: float(r["ours"]) for key, r in rows.items() if key[-1] == "best" and r["ours"]}
    last = {key[:-1]: float(r["ours"]) for key, r in rows.items() if key[-1] == "last" and r["ours"]}
    assert best.keys() == last.keys()
    assert all(best[key] >= last[key] for key in best)


def test_a_mean_is_that_of_the_cells_in_the_ledger(run: Run) -> None:
    kept = [json.loads(path.read_text()) for path in (run.root / "out" / "cells").glob("*.json")]
    usual = [
        result["last"]["aupro"]
        for result in kept
        if (result["cell"]["dataset"], result["cell"]["method"]) == ("mvtec", "bgad")
        and result["cell"]["known_types"] is result["cell"]["test_types"] is None
        and result["cell"]["num_anomalies"] == 10
        and not result["cell"]["overrides"]
        and result["cell"]["category"] in run.categories["mvtec"]
    ]
    assert len(usual) == len(run.categories["mvtec"])
    rows = run.rows_of("unsupervised_vs_bgad")
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
def test_every_value_of_a_sweep_was_run(run: Run, name: str) -> None:
    if name not in run.sweeps:
        pytest.skip("in the slow tier")
    rows = [row for row in run.rows_of(name) if row["selection"] == "last"]
    assert len({row["value"] for row in rows}) > 1
    assert {row["metric"] for row in rows} == {"image_auroc", "pixel_auroc", "aupro"}
    assert all(0.5 < float(row["ours"]) <= 1 for row in rows)
    bgad = {row["value"]: row["ours"] for row in rows if row["method"] == "bgad" and row["metric"] == "pixel_auroc"}
    if len(bgad) > 1:
        assert len(set(bgad.values())) > 1  # the option reached the training


def test_the_files_that_people_read(run: Run) -> None:
    out = run.root / "out"
    for name in (*table_names(), *run.sweeps):
        assert r"\begin{tabular}" in (out / "tables" / f"{name}.tex").read_text()
        assert list((out / "charts").glob(f"{name}-*.svg"))
    page = (run.root / "tables.html").read_text()
    assert page.count("data:image/jpeg") >= 4 * len(run.categories["mvtec"])
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "Best on test" in page
    assert (out / "qualitative.png").stat().st_size > 10_000
    manifest = json.loads((out / "manifest.json").read_text())
    assert "versions" in json.dumps(manifest)
    pictures = list((out / "pictures").glob("*.npz"))
    shown = {tuple(path.name.split("-")[:3]) for path in pictures}
    # of NFAD and BGAD
    assert len(shown) == 2 * len({*itertools.chain(*run.categories.values()), "transistor"})
    assert all(np.load(path)["maps"].ndim == 3 for path in pictures[:2])


def test_the_same_command_runs_nothing_twice(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    cells = {path: path.stat().st_mtime_ns for path in (run.root / "out" / "cells").iterdir()}
    assert run.tables(["btad", "one_class"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (run.root / "out" / "cells").iterdir()} == cells
    assert "0 trainings to run" in capsys.readouterr().out
