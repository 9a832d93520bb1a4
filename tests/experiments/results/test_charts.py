"""Charts for the page and for paper."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from fastbgad.experiments.results.charts import drawings_of
from fastbgad.experiments.results.summary import summarize
from fastbgad.render.svg import CSS, for_paper
from tests.experiments.results.conftest import results_of
from tests.made_up_results import sweep, table


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
