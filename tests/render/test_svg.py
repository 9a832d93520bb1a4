"""Charts as SVG."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET

from fastbgad.render.svg import drawn_svg, new_figure


def test_texts_that_are_not_utf8() -> None:
    figure, axes = new_figure()
    axes.plot([1, 2], label=os.fsdecode(b"r\xfcn"))
    axes.set_title(os.fsdecode(b"k\xe4rn"))
    axes.legend()
    svg = drawn_svg(figure, "chart")
    ET.fromstring(svg)
    assert "k\\xe4rn" in svg
    assert "r\\xfcn" in svg
