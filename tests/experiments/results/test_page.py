"""The page of the experiments and the files beside it: self-contained, complete, with what is missing."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest

from fastbgad.errors import MissingDependencyError
from fastbgad.experiments.plan.setup import Setup
from fastbgad.experiments.results.outputs import print_plans, write_outputs
from tests.evaluate.test_report import Page
from tests.experiments.results.conftest import FACTS, keep_maps, page_of, results_of
from tests.made_up_results import cell, published, result, sweep, table


def test_everything_is_written_and_the_page_needs_nothing_else(tmp_path):
    plans = [table(), sweep()]
    for method in ("nfad", "bgad"):
        keep_maps(tmp_path, cell(method=method))
    files = write_outputs(tmp_path, plans, results_of(*plans), Setup(), FACTS)
    metrics = ("image_auroc", "pixel_auroc", "aupro")
    assert {str(file.relative_to(tmp_path)) for file in files} == {
        *(f"tables/{name}.{suffix}" for name in ("toy", "swept") for suffix in ("csv", "tex")),
        *(f"charts/{name}-{metric}.svg" for name in ("toy", "swept") for metric in metrics),
        "qualitative.png",
        "reproduce.html",
    }
    page = Page(files[-1])
    assert not re.search(r"https?://|@import|<script", page.source)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.values("img", "src"))
    links = [value for tag, name, value in page.attributes if name in ("href", "src") and tag != "img"]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert all(reference in ids for reference in re.findall(r"url\(#([^)]*)\)", page.source))
    assert re.findall(r"url\((?!#)", page.source) == []
    # A clip path or marker of one chart must not be taken by another.
    charts = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(charts) == 6
    of_charts = [set(re.findall(r' id="([^"]*)"', chart)) for chart in charts]
    assert len(set.union(*of_charts)) == sum(map(len, of_charts))


def test_numbers_and_differences_stand_in_the_page(tmp_path, monkeypatch):
    numbers = (
        published("carpet", "NFAD", "aupro", 0.7912, 0.003),
        published("carpet", "BGAD", "aupro", 0.84),
        published("carpet", "DRA", "aupro", 0.5),
    )
    monkeypatch.setattr("fastbgad.experiments.results.outputs.published", lambda name: numbers if name == "toy" else ())
    plan = table(categories=["carpet"])
    page = page_of(tmp_path, [plan], results_of(plan) | {cell(method="bgad"): result(cell(method="bgad"), 0.92, 0.99)})
    last, best = page.source.split('<div class="block ')[1:]
    assert last.startswith("last")
    assert best.startswith("best")
    assert "selected on the test set" in best.split("</h4>")[0]
    assert "selected on the test set" not in last.split("</h4>")[0]

    def cells(block: str) -> list[list[str]]:
        rows = re.findall(r"<tr.*?</tr>", block.split("<tbody>")[1].split("</tbody>")[0], re.DOTALL)
        return [re.findall(r"<td class=\"([^\"]*)\">(.*?)</td>", row) for row in rows]

    assert cells(last)[0] == [
        ("published start", "79.12 ±0.30"), ("ours", "80.00 ±0.00"), ("difference better-2", "+0.88"),
        ("published start", "84.00"), ("ours", "<b>81.00 ±1.41</b>"), ("difference worse-3", "−3.00"),
        ("published", "50.00"),
    ]  # fmt: skip
    assert cells(best)[0][4:6] == [("ours", "<b>87.00 ±2.83</b>"), ("difference better-3", "+3.00")]
    assert "published only" in last
    assert "4 of 4 cells" in page.text


def test_what_is_missing_is_counted(tmp_path):
    plan = table(categories=["carpet", "grid"], methods=["nfad"])
    there = results_of(plan)
    del there[cell("grid", seed=1)]
    page = page_of(tmp_path, [plan], there)
    assert page.text.count("1/2 seeds") == 3 * 2 * 2  # grid and mean, three metrics, two selections
    assert "3 of 4 cells are measured" in page.text
    assert "Missing cells (1)" in page.text
    assert "grid · NFAD · seed 1 · 10 known" in page.text


def test_a_run_of_which_nothing_is_there_still_has_a_page(tmp_path, capsys):
    plans = [table(), sweep(), table(name="none", categories=[])]
    page = page_of(tmp_path, plans, {}, {})
    assert page.text.count("0/2 cells") == 2 * 2 * 3 * 2 + 2 * 3 * 2
    assert page.text.count("Nothing to draw yet") == 9
    assert "Nothing was recorded" in page.text
    assert "<svg" not in page.source
    assert not (tmp_path / "charts").exists()
    print_plans(plans, {})
    assert "0/4 cells" in capsys.readouterr().out


def test_setup_manifest_and_machines_are_told(tmp_path):
    plan = table(categories=["carpet"], methods=["nfad"])
    first, second = plan.cells
    there = {
        first: result(first, 0.9, facts={"device": "H100", "parameters": 17}),
        second: result(second, 0.9, facts={"device": "CPU", "versions": {"timm": "1.0"}}),
    }
    page = page_of(tmp_path, [plan], there)
    for expected in ("fastbgad reproduce btad", "versions.torch 2.11.0", Setup().digest, "training.flow.clamp"):
        assert expected in page.text
    assert "H100 1 cell CPU 1 cell" in page.text
    assert "versions.timm 1.0" in page.text
    assert "(40 in all)" in page.text
    assert "A note." in page.text
    assert "2 min" in page.text  # sixty seconds for each training


def test_shared_trainings_are_timed_once(tmp_path):
    rows = table(categories=["carpet"], methods=["nfad"], seeds=[0], settings=["multi_class", "one_class"])
    assert len(rows.cells) == 2
    assert len({one.training_key for one in rows.cells}) == 1
    assert "2 of 2 cells · 60 s" in page_of(tmp_path, [rows], results_of(rows)).text


def test_names_cannot_break_the_page(tmp_path):
    evil = '<b onload="x">&$a_b^c$'
    plan = table(categories=[evil], title=evil, note=evil, name="toy")
    keep_maps(tmp_path, cell(evil), names=(evil,))
    page = page_of(tmp_path, [plan], results_of(plan, facts={evil: evil}), {evil: evil})
    assert "<b onload" not in page.source
    assert page.text.count(evil) >= 8
    swept = sweep(values=(evil, "b"), option="augment.kind", label=evil)
    assert "<b onload" not in page_of(tmp_path, [swept], results_of(swept)).source


def test_tables_are_written_before_a_missing_package_is_noticed(tmp_path, monkeypatch):
    plan = table()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match="jinja2"):
        write_outputs(tmp_path, [plan], results_of(plan), Setup(), FACTS)
    assert (tmp_path / "tables" / "toy.csv").is_file()
    assert (tmp_path / "tables" / "toy.tex").is_file()
    assert not (tmp_path / "reproduce.html").exists()


def test_writing_again_replaces_what_was_there(tmp_path):
    plan = replace(table(categories=["carpet"], methods=["nfad"]), title="First")
    page_of(tmp_path, [plan], {})
    page = page_of(tmp_path, [replace(plan, title="Second")], results_of(plan))
    assert "Second" in page.text
    assert "First" not in page.text
    assert {file.name for file in tmp_path.iterdir()} == {"tables", "charts", "reproduce.html"}
