"""Names and numbers for readers."""

from __future__ import annotations

import pytest

from fastbgad.experiments.results.summary import Estimate, Measured
from fastbgad.experiments.results.texts import count_text, method_text, ours_text, percent, row_text, signed, value_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(None), "-"),
        (percent(0.99996), "100.00"),
        (signed(-0.000001), "0.00"),
        (signed(0.00123), "+0.12"),
        (signed(-0.0123), "-1.23"),
        (signed(None), "-"),
        (row_text("metal_nut:bent"), "metal nut, bent"),
        (row_text("mean"), "Mean"),
        (row_text("carpet:mean"), "carpet, mean"),
        (method_text("BGAD_wo"), "BGAD w/o"),
        (method_text("padim"), "PaDiM"),
        (method_text("VT-ADL"), "VT-ADL"),
        (value_text(True), "on"),
        (value_text(0.00001), "1e-05"),
        (value_text(8), "8"),
        (value_text("cutpaste"), "cutpaste"),
    ],
)
def test_texts(text, expected):
    assert text == expected


def test_counts_are_told_only_where_something_is_missing():
    empty, one = Estimate(None, None, 0), Estimate(0.5, None, 1)
    assert count_text(Measured(one, one, 1, 3, 3), "last") == ""
    assert count_text(Measured(one, empty, 5, 3, 15), "last") == "1/5 seeds"
    assert count_text(Measured(empty, empty, 5, 3, 15), "last") == "3/15 cells"
    assert ours_text(Measured(empty, empty, 5, 3, 15), "last") == "-"
