"""The matrix of a metric: order of the columns, rows, and the best of our numbers."""

from __future__ import annotations

from fastbgad.experiments.results.matrix import matrix_of
from fastbgad.experiments.results.summary import summarize
from tests.experiments.results.conftest import NUMBERS
from tests.made_up_results import cell, published, result, table


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
