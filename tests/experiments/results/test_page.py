"""The page of the experiments and the files beside it: self-contained, complete, and honest about what is missing."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fastbgad.errors import MissingDependencyError
from fastbgad.experiments.plan.setup import Setup
from fastbgad.experiments.results.charts import drawings_of
from fastbgad.experiments.results.outputs import print_plans, write_outputs
from fastbgad.experiments.results.pictures import load_examples
from fastbgad.experiments.results.summary import summarize
from fastbgad.render.plots import heat_colors
from fastbgad.render.svg import CSS, for_paper
from tests.evaluate.test_report import Page
from tests.made_up_results import cell, published, result, sweep, table

FACTS = {"command": "fastbgad reproduce btad", "versions": {"torch": "2.11.0"}, "long": list(range(40))}


def results_of(*plans, value: float = 0.9, best: float | None = 0.95, **changes):
    return {one: result(one, value, best, **changes) for plan in plans for one in plan.cells}


def page_of(tmp_path, plans, results, facts=FACTS) -> Page:
    files = write_outputs(tmp_path, plans, results, Setup(), facts)
    assert files[-1] == tmp_path / "reproduce.html"
    assert all(file.is_file() for file in files)
    return Page(files[-1])


def keep_maps(tmp_path, of, names=("cut/0.png", "cut/1.png", "hole/0.png", "good/0.png"), **changes) -> None:
    """The file of a cell: noise, a square defect on all images but the good ones, and scores of 1 there."""
    count, rng = len(names), np.random.default_rng(0)
    masks = np.zeros((count, 40, 40), bool)
    masks[[not name.startswith("good") for name in names], 10:30, 10:30] = True
    images = rng.integers(90, 110, (count, 40, 40, 3), dtype=np.uint8)
    arrays = {"names": np.array(names), "images": images, "masks": masks, "maps": masks.astype(np.float16)}
    (tmp_path / "pictures").mkdir(exist_ok=True)
    arrays |= {"range": np.array([0, 1], np.float32)} | changes
    np.savez(tmp_path / "pictures" / f"{of.key}.npz", **arrays)


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


def test_charts_are_drawn_on_paper_and_on_the_page():
    plans = [table(), sweep(methods=["bgad", "nfad"]), sweep(name="onoff", values=(False, True), option="loss.focal")]
    for plan in plans:
        drawing = next(drawings_of(summarize(plan, results_of(plan))))
        assert "var(--series-1)" in drawing.chart.svg
        text = for_paper(drawing.svg)
        ET.fromstring(text)
        assert "var(--" not in text
        assert not set(CSS) & set(re.findall("#[0-9a-f]{6}", text))
        assert "#2f5fa8" in text
        if plan is plans[0]:
            assert ">carpet</text>" in drawing.chart.svg
            assert ">carpet</text>" in text


def x_of(svg: str, color: str) -> list[float]:
    """Horizontal places of the markers of one colour, in the order of drawing."""
    return [float(x) for x in re.findall(rf'<use [^>]*?x="([\d.]+)"[^>]*?style="[^"]*{re.escape(color)}', svg)]


def test_the_axis_of_a_sweep_follows_its_values():
    def places(values, **changes) -> list[float]:
        plan = sweep(values=values, **changes)
        drawing = next(drawings_of(summarize(plan, results_of(plan, best=None))))
        return x_of(drawing.chart.svg, "var(--series-1)")[: len(values)]

    a, b, c = places((0.001, 0.01, 0.1))
    assert c - b == pytest.approx(b - a, rel=1e-3)
    a, b, c = places((0.0, 0.1, 1.0))  # a logarithm has no zero
    assert a < b < c
    a, b, c = places((1, 2, 4), option="flow.coupling_layers", logarithmic=False)
    assert c - b == pytest.approx(2 * (b - a), rel=1e-3)
    a, b, c = places(("none", "flip", "cutpaste"), option="x.y")
    assert c - b == pytest.approx(b - a, rel=1e-3)


def test_incomplete_points_are_not_drawn():
    plan = sweep(values=(0.001, 0.01, 0.1))
    there = results_of(plan, best=None)
    complete = next(drawings_of(summarize(plan, there))).chart.svg
    for one in plan.points[1].cells:
        del there[one]
    drawn = next(drawings_of(summarize(plan, there))).chart.svg
    places = [len(set(x_of(svg, "var(--series-1)"))) for svg in (complete, drawn)]
    assert places == [4, 3]  # one of them is the legend's


def test_the_qualitative_figure_takes_both_methods_maps_of_the_same_images(tmp_path):
    plan = table(methods=["nfad", "bgad"])
    keep_maps(tmp_path, cell("carpet", "nfad"))
    # In another order, and with a map that is hot everywhere.
    names = ("hole/0.png", "cut/0.png")
    keep_maps(tmp_path, cell("carpet", "bgad"), names=names, maps=np.ones((2, 40, 40), np.float16))
    keep_maps(tmp_path, cell("grid", "bgad", 1))
    examples, problems = load_examples(tmp_path, [plan])
    assert problems == []
    assert [(e.category, e.name) for e in examples] == [
        ("carpet", "cut/0.png"), ("carpet", "hole/0.png"), ("grid", "cut/0.png"), ("grid", "hole/0.png"),
    ]  # fmt: skip
    assert [panel.caption for panel in examples[0].panels] == ["Input", "Ground truth", "NFAD map", "BGAD map"]
    photo, _, nfad, bgad = (panel.picture for panel in examples[0].panels)
    hottest = heat_colors(np.array([1.0]))[0].astype(float)
    for picture, (y, x), is_hot in ((nfad, (20, 20), True), (nfad, (2, 2), False), (bgad, (2, 2), True)):
        assert (np.abs(picture[y, x] - hottest).mean() < 40) == is_hot
    assert photo.shape == (40, 40, 3)
    assert [panel.picture is None for panel in examples[2].panels] == [False, False, True, False]  # no NFAD of grid
    page = page_of(tmp_path, [plan], results_of(plan))
    assert page.text.count("no map") == 2
    assert len(page.values("img", "src")) == 4 * 4 - 2
    with Image.open(tmp_path / "qualitative.png") as figure:
        assert figure.width > 4 * 192
        assert figure.height > 4 * 192


def test_a_pair_of_maps_is_preferred_to_a_single_one(tmp_path):
    plan = table(categories=["carpet"], seeds=[0, 1])
    keep_maps(tmp_path, cell("carpet", "nfad", 0))
    for method in ("nfad", "bgad"):
        keep_maps(tmp_path, cell("carpet", method, 1), names=(f"cut/{method}.png", "cut/both.png"))
    examples, _ = load_examples(tmp_path, [plan])
    assert [e.name for e in examples] == ["cut/nfad.png", "cut/both.png"]
    # Maps of sweeps and of other plans are not looked at.
    assert load_examples(tmp_path, [sweep()]) == ([], [])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b""), "it is no archive"),
        (lambda file: file.write_bytes(file.read_bytes()[:700]), "it is no archive"),
        (lambda file: np.savez(file, names=np.array(["a"])), "it is no archive"),
        (lambda file: np.savez(file, names=np.array([{}])), "it is no archive"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_goes_on(tmp_path, damage, message):
    plan = table(categories=["carpet", "grid"])
    for category in ("carpet", "grid"):
        keep_maps(tmp_path, cell(category))
    broken = tmp_path / "pictures" / f"{cell('carpet').key}.npz"
    damage(broken)
    page = page_of(tmp_path, [plan], results_of(plan))
    assert f"pictures/{broken.name} is left out: {message}" in page.text
    assert len(page.values("img", "src")) == 2 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": np.zeros((4, 40, 39), np.float16)}, "do not belong together"),
        ({"images": np.zeros((4, 40, 40), np.uint8)}, "do not belong together"),
        ({"range": np.zeros(3, np.float32)}, "names or its range"),
        (
            {"images": np.zeros((3, 9, 9, 3), np.uint8), "masks": np.ones((3, 9, 9)), "maps": np.ones((3, 9, 9))},
            "names or its range",
        ),
        ({"maps": np.full((4, 40, 40), np.nan, np.float16)}, "NaN"),
        ({"images": np.zeros((4, 40, 40, 3), np.float32)}, "uint8"),
    ],
)
def test_maps_that_make_no_sense_are_told(tmp_path, changes, message):
    keep_maps(tmp_path, cell("carpet"), **changes)
    examples, (problem,) = load_examples(tmp_path, [table()])
    assert examples == []
    assert message in problem
    assert "carpet" in problem


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
