"""What is said of results: means over cells, then over seeds; deviations; differences; and what is missing."""

from __future__ import annotations

import pytest

from fastbgad.experiments.plan.cells import METRICS
from fastbgad.experiments.plan.plan import RowPlan
from fastbgad.experiments.plan.published import TABLES
from fastbgad.experiments.plan.published import published as all_published
from fastbgad.experiments.results.summary import Estimate, SweepSummary, TableRow, TableSummary, measure, summarize
from tests.made_up_results import cell, published, result, sweep, table

# Per seed the mean over two categories: 0.85 and 0.95. Their mean is 0.9, their sample deviation 0.1 / sqrt 2.
RESULTS = {
    one: result(one, value, value + 0.04)
    for one, value in (
        (cell("carpet", seed=0), 0.8),
        (cell("grid", seed=0), 0.9),
        (cell("carpet", seed=1), 0.94),
        (cell("grid", seed=1), 0.96),
    )
}
CELLS = tuple(RESULTS)


def row_of(summary: TableSummary, row: str, method: str, metric: str) -> TableRow:
    (found,) = [r for r in summary.rows if (r.row, r.method, r.metric) == (row, method, metric)]
    return found


def test_seeds_are_averaged_after_cells():
    got = measure(CELLS, RESULTS, "image_auroc")
    assert got.last.mean == pytest.approx(0.9)
    assert got.last.std == pytest.approx(0.1 / 2**0.5)
    assert got.best.mean == pytest.approx(0.94)
    assert (got.last.seeds, got.seeds_planned, got.cells, got.cells_planned) == (2, 2, 4, 4)
    assert got.is_complete
    assert measure(CELLS, RESULTS, "aupro").last.mean == pytest.approx(0.8)


def test_a_seed_counts_only_if_all_its_cells_are_there():
    there = {one: RESULTS[one] for one in CELLS[:3]}
    got = measure(CELLS, there, "image_auroc")
    assert got.last == Estimate(pytest.approx(0.85), None, 1)  # seed 1 would have made it 0.895
    assert (got.cells, got.cells_planned, got.is_complete) == (3, 4, False)
    got = measure(CELLS, {CELLS[0]: RESULTS[CELLS[0]]}, "image_auroc")
    assert got.last == got.best == Estimate(None, None, 0)
    assert (got.seeds_planned, got.cells) == (2, 1)


def test_nothing_is_counted_twice():
    got = measure(CELLS + CELLS[:1] * 5, RESULTS, "image_auroc")
    assert got == measure(CELLS, RESULTS, "image_auroc")


def test_results_of_other_plans_do_not_count():
    other = cell("carpet", seed=0, num_anomalies=5)
    got = measure(CELLS[:1], {other: result(other, 0.5)}, "aupro")
    assert (got.last.mean, got.cells) == (None, 0)


def test_methods_measured_once_have_no_best():
    one = cell(method="padim")
    got = measure([one], {one: result(one, 0.7)}, "image_auroc")
    assert got.last.mean == 0.7
    assert got.best == Estimate(None, None, 0)


def test_differences_are_ours_minus_published():
    numbers = [published("mean", "NFAD", "image_auroc", 0.93, 0.01), published("mean", "NFAD", "aupro", 0.7)]
    row = row_of(summarize(table(methods=["nfad"]), RESULTS, numbers), "mean", "NFAD", "image_auroc")
    assert (row.published, row.published_std) == (0.93, 0.01)
    assert row.difference("last") == pytest.approx(-0.03)
    assert row.difference("best") == pytest.approx(0.01)
    summary = summarize(table(methods=["nfad"]), RESULTS, numbers)
    assert row_of(summary, "mean", "NFAD", "aupro").difference("last") == pytest.approx(0.1)
    assert row_of(summary, "mean", "NFAD", "pixel_auroc").difference("last") is None  # nothing published
    assert summary.metrics == ("image_auroc", "aupro")
    empty = summarize(table(methods=["nfad"]), {}, numbers)
    assert row_of(empty, "mean", "NFAD", "image_auroc").difference("last") is None  # nothing measured


def test_a_mean_over_fewer_categories_is_not_compared():
    plan = table(methods=["nfad"])
    rows = tuple(RowPlan(r.setting, r.row, r.method, r.cells, comparable=r.row != "mean") for r in plan.rows)
    numbers = [published(name, "NFAD", "image_auroc", 0.5) for name in ("carpet", "mean")]
    summary = summarize(table(methods=["nfad"]), RESULTS, numbers)
    assert row_of(summary, "mean", "NFAD", "image_auroc").difference("last") == pytest.approx(0.4)
    partial = summarize(type(plan)(plan.name, plan.title, plan.note, plan.dataset, rows), RESULTS, numbers)
    row = row_of(partial, "mean", "NFAD", "image_auroc")
    assert row.measured is not None
    assert row.measured.last.mean == pytest.approx(0.9)
    assert row.difference("last") is None
    assert row_of(partial, "carpet", "NFAD", "image_auroc").difference("last") == pytest.approx(0.37)


def test_published_only_methods_keep_their_place():
    numbers = [
        published("carpet", "DRA", "image_auroc", 0.6),
        published("carpet", "BGAD", "image_auroc", 0.9),
        published("wood", "DRA", "image_auroc", 0.6),
        published("carpet", "DRA", "image_auroc", 0.1, table="another"),
    ]
    summary = summarize(table(methods=["cflow_ad", "bgad"]), {}, numbers)
    assert summary.methods == ("DRA", "BGAD", "CFLOW-AD")
    row = row_of(summary, "carpet", "DRA", "image_auroc")
    assert (row.published, row.measured) == (0.6, None)
    assert not [r for r in summary.rows if r.method == "DRA" and (r.row, r.metric) != ("carpet", "image_auroc")]
    assert summary.left_out == ("multi_class wood",)
    assert len(summary.rows) == 1 + 2 * 3 * 3  # DRA; two methods, three rows, three metrics


def test_a_table_without_published_numbers_has_all_metrics():
    summary = summarize(table(), {})
    assert summary.metrics == tuple(METRICS)
    assert all(row.published is None for row in summary.rows)


def test_sweeps_have_a_row_per_point_and_metric():
    plan = sweep()
    first, second = plan.points
    there = {
        one: result(one, value, 0.97) for one, value in zip(first.cells + second.cells, (0.8, 0.9, 0.5), strict=False)
    }
    summary = summarize(plan, there)
    assert isinstance(summary, SweepSummary)
    assert [(row.value, row.metric) for row in summary.rows] == [(v, m) for v in (0.01, 0.1) for m in METRICS]
    assert summary.rows[0].measured.last == Estimate(pytest.approx(0.85), pytest.approx(0.1 / 2**0.5), 2)
    assert summary.rows[0].measured.best == Estimate(pytest.approx(0.97), pytest.approx(0), 2)
    assert summary.rows[3].measured.last == Estimate(0.5, None, 1)
    assert (summary.rows[3].measured.cells, summary.rows[3].measured.cells_planned) == (1, 2)


@pytest.mark.parametrize("name", TABLES)
def test_the_shipped_tables_find_all_their_published_numbers(name):
    from fastbgad.experiments.plan.protocol import make_plan

    numbers = all_published(name)
    summary = summarize(make_plan(name, seeds=[0]), {}, numbers)
    assert summary.left_out == ()
    assert {(r.setting, r.row, r.method, r.metric) for r in summary.rows if r.published is not None} == {
        number.key for number in numbers
    }
