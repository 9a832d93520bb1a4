"""The HTML report: self-contained, complete, safe with odd names, and whole or absent."""

from __future__ import annotations

import base64
import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fastbgad.errors import ConfigError, DataError, FeatureError, MissingDependencyError, OutputError
from fastbgad.evaluate import report
from fastbgad.evaluate.report import ImageRow, LevelHistogram, RunReport, write_report
from fastbgad.render import plots

RNG = np.random.default_rng(0)
VOID = {"meta", "img", "br", "hr", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text, attributes and pictures."""

    def __init__(self, path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, tag: str, name: str) -> list[str]:
        return [v for t, n, v in self.attributes if (t, n) == (tag, name)]


def image_row(
    name: str = "000.png", defect: str = "scratch", label: int = 1, score: float = 0.7, **changes
) -> ImageRow:
    height, width = 24, 32
    mask = np.zeros((height, width), dtype=bool)
    mask[4:9, 5:20] = bool(label)
    picture = RNG.integers(0, 255, (height, width, 3), dtype=np.uint8)
    row = ImageRow(name, defect, label, score, picture, mask, RNG.random((height, width)), mask * np.uint8(2))
    return replace(row, **changes)


def run_report(category: str = "brick", method: str = "BGAD", **changes) -> RunReport:
    run = RunReport(
        category=category,
        method=method,
        metrics={"image_auroc": 0.9512, "pixel_auroc": 0.9876, "aupro": 0.9034, "n_images": 2},
        rows=[image_row(), image_row("001.png", "good", 0, 0.1234)],
        levels=[LevelHistogram("Level 1", RNG.normal(-0.2, 0.1, 300), RNG.normal(-0.7, 0.1, 50), -0.4, -0.5)],
        history=[{"pass": s, "loss": 2.0 - s / 10, "b_n_0": -1 + s / 20} for s in range(10)],
        seconds=83.0,
        map_range=(0.25, 0.75),
        config={"lr": 2e-4, "model": {"blocks": 8}},
        versions={"torch": "2.11.0"},
    )
    return replace(run, **changes)


def page_of(tmp_path, runs, **options) -> Page:
    path = tmp_path / "report.html"
    write_report(path, runs, options.pop("title", "A report"), **options)
    return Page(path)


def test_the_file_needs_nothing_from_outside(tmp_path):
    page = page_of(tmp_path, [run_report(method="NFAD"), run_report(), run_report("grass")])
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert "@import" not in page.source
    assert "<script" not in page.source
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.values("img", "src"))
    links = [value for tag, name, value in page.attributes if name in ("href", "src") and tag != "img"]
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert all(reference in ids for reference in re.findall(r"url\(#([^)]*)\)", page.source))
    assert re.findall(r"url\((?!#)", page.source) == []


def test_every_value_appears(tmp_path):
    page = page_of(tmp_path, [run_report()], title="Brick report")
    for value in (
        "Brick report",
        "brick",
        "BGAD",
        "Image AUROC",
        "95.12",
        "98.76",
        "90.34",
        "000.png",
        "scratch",
    ):
        assert value in page.text
    for value in ("0.7", "0.123", "0.25", "0.75", "1 min 23 s", "lr", "0.0002", "model.blocks", "8", "torch", "2.11.0"):
        assert value in page.text
    for value in (
        "Level 1",
        "Loss",
        "Boundaries",
        "b_n, level 1",
        "Image scores",
        "1 anomalous and 1 normal test images",
    ):
        assert value in page.text
    assert len(page.values("img", "src")) == 8
    assert all(page.values("img", "alt"))


def test_pictures_are_small_and_show_the_paint(tmp_path):
    big = image_row(
        image=np.full((300, 600, 3), 90, np.uint8),
        mask=np.eye(300, 600, dtype=bool),  # one pixel wide: must survive the shrinking
        anomaly_map=np.linspace(0, 1, 180_000, dtype=np.float32).reshape(300, 600),
        decision=np.zeros((300, 600), np.uint8),
    )
    page = page_of(tmp_path, [run_report(rows=[big])])
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))), dtype=float)
        for source in page.values("img", "src")
    ]
    assert [picture.shape for picture in pictures] == [(128, 256, 3)] * 4
    photo, truth, heat, decision = pictures
    diagonal = truth[np.arange(128), np.arange(128)]
    assert np.abs(diagonal - plots.GROUND_TRUTH_COLOR).mean() < 40
    assert heat[-1].mean() > heat[0].mean() + 30
    np.testing.assert_allclose(decision, photo, atol=3)


def test_methods_are_compared(tmp_path):
    weak = {"image_auroc": 0.9, "pixel_auroc": 0.9876, "aupro": 0.95}
    runs = [
        run_report(c, m, metrics=weak if m == "NFAD" else run_report().metrics) for c in "ab" for m in ("NFAD", "BGAD")
    ]
    page = page_of(tmp_path, runs)
    tables = page.source.split('class="card metrics"')[1:]
    assert len(tables) == 3
    assert tables[0].count("<b>95.12</b>") == 3  # two categories and their mean
    assert "<b>90.00</b>" not in tables[0]
    assert tables[0].count("+5.12") == 3
    assert tables[1].count("<b>98.76</b>") == 6  # a tie: both are best
    assert tables[2].count("−4.66") == 3
    assert all(table.count(">Mean<") == 1 for table in tables)
    # Side by side: input and truth once, then a map and a decision per method.
    assert len(page.values("img", "src")) == 2 * 2 * 6


def test_no_mean_over_different_categories(tmp_path):
    page = page_of(tmp_path, [run_report("a", "NFAD"), run_report("a"), run_report("b")])
    table = page.source.split('class="card metrics"')[1].split("</table>")[0]
    mean = re.findall(r"<td>(.*?)</td>", table.split(">Mean<")[1])
    assert mean == ["–", "95.12", "–"]


def test_an_image_only_one_method_saw(tmp_path):
    runs = [run_report(method="NFAD", rows=[image_row()]), run_report()]
    assert "not among the test images of NFAD" in page_of(tmp_path, runs).text


def test_names_cannot_break_the_page(tmp_path):
    evil = '<b onload="x">&</script>'
    row = image_row(evil, evil)
    level = LevelHistogram(evil, RNG.normal(size=50), np.empty(0), 0.0, None)
    history = [{"loss" + evil: 1.0}]
    run = run_report(
        evil, evil, rows=[row], levels=[level], history=history, config={evil: evil}, versions={evil: evil}
    )
    page = page_of(tmp_path, [run], title=evil)
    assert "<b onload" not in page.source
    assert page.text.count(evil) >= 8
    assert any(evil in alt for alt in page.values("img", "alt"))


def test_missing_parts_are_said(tmp_path):
    empty = run_report(
        metrics={"image_auroc": float("nan")},
        rows=[],
        levels=[],
        history=[],
        seconds=float("nan"),
        config={},
        versions={},
    )
    text = page_of(tmp_path, [empty]).text
    for note in ("No test images were", "No log-likelihoods were", "No training history", "Neither was recorded", "–"):
        assert note in text
    assert "not recorded" in text
    assert "No metrics were recorded" in page_of(tmp_path, [replace(empty, metrics={})]).text
    broken = run_report(
        history=[{"pass": 0, "loss": float("nan")}, {"pass": 1, "loss": 1.0}],
        rows=[image_row(score=float("nan"), mask=None)],
    )
    text = page_of(tmp_path, [broken]).text
    assert "Values that are NaN or Inf are left out: loss." in text
    assert "not finite" in text
    assert "no mask" in text


def test_the_choice_of_images_shows_the_likeliest_mistakes(tmp_path):
    rows = [image_row(f"s{i}.png", "scratch", 1, score=i) for i in range(6)]
    rows += [image_row(f"h{i}.png", "hole", 1, score=i) for i in range(2)]
    rows += [image_row(f"g{i}.png", "good", 0, score=i) for i in range(5)]
    names = lambda count: [row.name for row in report._choose(rows, {row.name: row.score for row in rows}, count)]  # noqa: E731
    assert names(3) == ["h0.png", "s0.png", "g4.png"]
    assert names(6) == ["h0.png", "h1.png", "s0.png", "s5.png", "g4.png", "g0.png"]
    assert sorted(names(99)) == sorted(row.name for row in rows)
    page = page_of(tmp_path, [run_report(rows=rows)], max_images=3)
    assert "10 more are left out" in page.text
    assert len(page.values("img", "src")) == 12


def test_settings_that_differ_are_attributed(tmp_path):
    runs = [run_report(method="NFAD", config={"lr": 1.0, "beta": 0.01}), run_report(config={"lr": 2.0, "beta": 0.01})]
    assert report._comparison(runs, lambda run: run.config) == [
        ("lr", [("brick NFAD", "1.0"), ("brick BGAD", "2.0")]),
        ("beta", [("", "0.01")]),
    ]


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        ([], ConfigError, "at least one run"),
        ([run_report(), run_report()], ConfigError, "two runs of the method BGAD on the category brick"),
        (
            [run_report(rows=[image_row(mask=np.ones((3, 3), bool))])],
            DataError,
            r"the mask of 000.png has the size \[3, 3\]",
        ),
        ([run_report(rows=[image_row(anomaly_map=np.ones((3, 3)))])], DataError, "the anomaly map of 000.png"),
        ([run_report(rows=[image_row(decision=np.ones((3, 3), np.uint8))])], DataError, "the decision of 000.png"),
        ([run_report(rows=[image_row(image=np.ones((24, 32)))])], DataError, "the picture of 000.png must be uint8"),
        (
            [run_report(rows=[image_row(anomaly_map=np.full((24, 32), np.nan))])],
            FeatureError,
            "map of 000.png holds NaN",
        ),
    ],
)
def test_bad_input_leaves_the_old_report_alone(tmp_path, runs, error, message):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(error, match=message):
        write_report(path, runs, "title")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="file"):
        write_report(tmp_path / "file" / "report.html", [run_report()], "title")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        write_report(tmp_path / "folder", [run_report()], "title")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_a_missing_jinja2_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"jinja2: pip install 'fastbgad\[report\]'"):
        write_report(tmp_path / "report.html", [run_report()], "title")
