"""Tables in the terminal, as CSV and as LaTeX: every number in its place, and none where there is none."""

from __future__ import annotations

import csv
import io
import re

import pytest

from fastbgad.experiments.results.latex import escaped, latex_text
from fastbgad.experiments.results.matrix import matrix_of
from fastbgad.experiments.results.summary import Estimate, Measured, summarize
from fastbgad.experiments.results.tables import SWEEP_COLUMNS, TABLE_COLUMNS, csv_text, print_summary
from fastbgad.experiments.results.texts import count_text, method_text, ours_text, percent, row_text, signed, value_text
from tests.made_up_results import cell, published, result, sweep, table

NUMBERS = [
    published("carpet", "DRA", "image_auroc", 0.6),
    published("carpet", "NFAD", "image_auroc", 0.9),
    published("mean", "BGAD", "image_auroc", 0.95, 0.002),
    published("mean", "NFAD", "image_auroc", 0.93),
]
VALUES = {
    ("carpet", "nfad"): (0.91, 0.93),
    ("grid", "nfad"): (0.95, 0.97),
    ("carpet", "bgad"): (0.98, 0.99),
    ("grid", "bgad"): (0.96,),  # the second seed is missing
}
RESULTS = {
    (one := cell(category, method, seed)): result(one, value, value + 0.01)
    for (category, method), values in VALUES.items()
    for seed, value in enumerate(values)
}


def lines_of(text: str) -> dict[tuple[str, ...], dict[str, str]]:
    return {
        tuple(line[name] for name in ("row", "method", "metric", "selection")): line
        for line in csv.DictReader(io.StringIO(text))
    }


def test_csv_has_every_number_once():
    text = csv_text(summarize(table(), RESULTS, NUMBERS))
    assert text.splitlines()[0] == ",".join(TABLE_COLUMNS)
    lines = lines_of(text)
    assert len(lines) == len(text.splitlines()) - 1 == 1 + 2 * 3 * 3 * 2
    assert lines["carpet", "NFAD", "image_auroc", "last"] == {
        "table": "toy", "dataset": "mvtec", "setting": "multi_class", "row": "carpet", "method": "NFAD",
        "metric": "image_auroc", "selection": "last", "published": "0.9", "published_std": "", "ours": "0.92",
        "ours_std": "0.014142", "difference": "0.02", "seeds": "2", "cells": "2", "cells_planned": "2",
    }  # fmt: skip
    best = lines["carpet", "NFAD", "image_auroc", "best"]
    assert (best["ours"], best["difference"]) == ("0.93", "0.03")
    mean = lines["mean", "BGAD", "image_auroc", "last"]  # seed 0 alone: (0.98 + 0.96) / 2
    assert [mean[k] for k in ("published", "published_std", "ours", "ours_std", "difference")] == [
        "0.95", "0.002", "0.97", "", "0.02",
    ]  # fmt: skip
    assert [mean[k] for k in ("seeds", "cells", "cells_planned")] == ["1", "3", "4"]
    only = lines["carpet", "DRA", "image_auroc", "published only"]
    assert [only[k] for k in ("published", "ours", "difference", "cells_planned")] == ["0.6", "", "", "0"]


def test_csv_of_a_sweep():
    plan = sweep(values=(False, True), option="loss.focal", logarithmic=False)
    first = plan.points[0].cells
    text = csv_text(summarize(plan, {first[0]: result(first[0], 0.8, 0.9), first[1]: result(first[1], 0.9, 0.9)}))
    lines = list(csv.DictReader(io.StringIO(text)))
    assert tuple(lines[0]) == SWEEP_COLUMNS
    assert len(lines) == 2 * 3 * 2
    assert list(lines[0].values()) == [
        "swept", "mvtec", "bgad", "off", "image_auroc", "last", "0.85", "0.070711", "2", "2", "2",
    ]  # fmt: skip
    assert list(lines[-1].values()) == ["swept", "mvtec", "bgad", "on", "aupro", "best", "", "", "0", "0", "2"]


def assert_sound_latex(text: str) -> None:
    """What LaTeX would stumble over: braces, environments, rows of another length, bare special letters."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    plain = re.sub(r"\\[\\{}&%$#_]", "", body.replace(r"\\", "\n"))
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{([^}]*)\}", body):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    tabulars = re.findall(r"\\begin\{tabular\}\{([lrc]+)\}(.*?)\\end\{tabular\}", body, re.DOTALL)
    assert tabulars
    for align, content in tabulars:
        rows = [line for line in content.splitlines() if line.rstrip().endswith(r"\\")]
        assert len(rows) > 2
        for row in rows:
            spans = [int(width) - 1 for width in re.findall(r"\\multicolumn\{(\d+)\}", row)]
            assert len(re.findall(r"(?<!\\)&", row)) + 1 + sum(spans) == len(align), row
        for start, end in re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", content):
            assert 2 <= int(start) <= int(end) <= len(align)
    outside = re.sub(r"\\label\{[^}]*\}|\$[^$]*\$", "", plain)
    assert not re.search(r"[_#^~±†−]", outside)


def test_latex_holds_the_numbers_of_both_selections_apart():
    text = latex_text(summarize(table(), RESULTS, NUMBERS))
    assert_sound_latex(text)
    last, best = text.split(r"\begin{table*}")[1:]
    assert r"\label{tab:toy-image-auroc-last}" in last
    assert r"\label{tab:toy-image-auroc-best}" in best
    assert "selects the epoch by the test set" in best
    assert "selects the epoch" not in last
    # NFAD, BGAD, and DRA, which is published only.
    assert r"carpet & 90.00 & 92.00 $\pm$1.41 & +2.00 & -- & \textbf{98.50 $\pm$0.71} & -- & 60.00 \\" in last
    assert r"carpet & 90.00 & 93.00 $\pm$1.41 & +3.00 & -- & \textbf{99.50 $\pm$0.71} & -- & 60.00 \\" in best
    assert r"Mean & 93.00 & 94.00 $\pm$1.41 & +1.00 & 95.00 $\pm$0.20 & \textbf{97.00 (1/2 seeds)} & +2.00" in last


def test_latex_escapes_names_and_survives_emptiness():
    hostile = table(categories=["a_b&c%d#{x}$~^\\"], title="100% \\of_it")
    assert_sound_latex(latex_text(summarize(hostile, {}, NUMBERS)))
    assert escaped("a_b & 50% {x} \\ BGAD†") == r"a\_b \& 50\% \{x\} \textbackslash{} BGAD$^\dagger$"
    text = latex_text(summarize(table(), {}, NUMBERS))
    assert_sound_latex(text)
    assert "carpet & 90.00 & -- (0/2 cells) & -- & -- & -- (0/2 cells) & -- & 60.00" in text
    assert r"\textbf" not in text


def test_latex_of_several_settings_and_of_sweeps():
    both = table(settings=["one_class", "hard_subsets"])
    text = latex_text(summarize(both, {}))
    assert_sound_latex(text)
    assert r"\multicolumn{7}{l}{\emph{Hard subsets}} \\" in text
    plan = sweep(methods=["bgad", "nfad"])
    there = {one: result(one, 0.9) for one in plan.cells}
    text = latex_text(summarize(plan, there))
    assert_sound_latex(text)
    assert r"0.01 & 90.00 $\pm$0.00 & -- & 90.00 $\pm$0.00 & -- \\" in text
    assert text.count(r"\begin{table*}") == 3


def test_the_terminal_shows_published_ours_and_differences(capsys):
    print_summary(summarize(table(), RESULTS, NUMBERS))
    lines = [[part.strip() for part in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["carpet", "NFAD", "90.00", "92.00 ±1.41", "+2.00", "93.00 ±1.41", "+3.00", "2 seeds"] in lines
    assert ["Mean", "BGAD", "95.00 ±0.20", "97.00", "+2.00", "98.00", "+3.00", "1/2 seeds"] in lines
    assert ["grid", "-"] in lines  # of DRA
    assert ["carpet", "60.00"] in lines
    print_summary(summarize(table(), {}, NUMBERS))
    lines = [[part.strip() for part in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["carpet", "NFAD", "90.00", "-", "-", "-", "-", "0/2 cells"] in lines
    plan = sweep()
    print_summary(summarize(plan, {one: result(one, 0.5) for one in plan.points[0].cells}))
    lines = [[part.strip() for part in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["0.01", "BGAD", "AUPRO", "40.00 ±0.00", "-", "2 seeds"] in lines
    assert ["0.1", "BGAD", "AUPRO", "-", "-", "0/2 cells"] in lines


def test_the_best_is_marked_among_ours_only():
    def best(values: dict[str, float], selection: str = "last") -> list[frozenset[int]]:
        there = {(one := cell("carpet", method)): result(one, value, 0.5) for method, value in values.items()}
        plan = table(categories=["carpet"], seeds=[0])
        return [line.best for line in matrix_of(summarize(plan, there, NUMBERS), "image_auroc", selection).lines]

    assert best({"nfad": 0.8, "bgad": 0.9}) == [{1}, {1}]
    assert best({"nfad": 0.9, "bgad": 0.8}) == [{0}, {0}]
    assert best({"nfad": 0.90001, "bgad": 0.90002}) == [{0, 1}, {0, 1}]  # they print alike
    assert best({"nfad": 0.9}) == [frozenset(), frozenset()]  # nothing to compare with
    assert best({"nfad": 0.8, "bgad": 0.9}, "best") == [{0, 1}, {0, 1}]


def test_columns_begin_with_the_papers_methods():
    numbers = [published("carpet", method, "aupro", 0.5) for method in ("DRA", "PaDiM", "CFLOW-AD", "NFAD", "BGAD")]
    summary = summarize(table(methods=["cflow_ad", "bgad", "nfad"]), {}, numbers)
    columns = matrix_of(summary, "aupro", "last").columns
    assert [column.method for column in columns] == ["NFAD", "BGAD", "CFLOW-AD", "DRA", "PaDiM"]
    assert [column.is_measured for column in columns] == [True, True, True, False, False]


def test_settings_of_one_mean_each_are_rows():
    plan = table(settings=["multi_class", "hard_subsets"])
    means = type(plan)("toy", "", "", "mvtec", tuple(row for row in plan.rows if row.row == "mean"))
    lines = matrix_of(summarize(means, {}), "aupro", "last").lines
    assert [(line.full_text, line.setting, line.is_mean) for line in lines] == [
        ("Multi-class", "", False),
        ("Hard subsets", "", False),
    ]
    lines = matrix_of(summarize(plan, {}), "aupro", "last").lines
    assert [line.full_text for line in lines][2:4] == ["Multi-class, Mean", "Hard subsets, carpet"]


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
