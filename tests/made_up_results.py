"""Cells, plans and results with numbers that can be computed by hand."""

from __future__ import annotations

from collections.abc import Sequence

from fastbgad.experiments.plan.cells import Cell, CellResult
from fastbgad.experiments.plan.plan import RowPlan, SweepPlan, SweepPoint, TablePlan
from fastbgad.experiments.plan.published import PublishedNumber

WRITTEN = {"nfad": "NFAD", "bgad": "BGAD", "cflow_ad": "CFLOW-AD"}


def cell(category: str = "carpet", method: str = "nfad", seed: int = 0, **changes) -> Cell:
    return Cell("mvtec", category, method, seed, **changes)


def result(of: Cell, value: float, best: float | None = None, **changes) -> CellResult:
    """Every metric has the value, but for the AUPRO, which is 0.1 less; likewise for the best ones."""
    facts = {"seconds": 60.0, "known_anomalies": [], "n_test": 9, "n_anomalous": 4, "facts": {}} | changes
    return CellResult(of, metrics(value), None if best is None else metrics(best), [], **facts)


def metrics(value: float) -> dict[str, float]:
    return {"image_auroc": value, "pixel_auroc": value, "aupro": value - 0.1}


def table(
    categories: Sequence[str] = ("carpet", "grid"),
    methods: Sequence[str] = ("nfad", "bgad"),
    seeds: Sequence[int] = (0, 1),
    settings: Sequence[str] = ("multi_class",),
    **changes,
) -> TablePlan:
    """A row for every category, and their mean."""
    rows = []
    for setting in settings:
        for method in methods:
            known = None if setting == "multi_class" else ("cut",)
            own = {c: tuple(cell(c, method, seed, known_types=known) for seed in seeds) for c in categories}
            own["mean"] = tuple(one for members in list(own.values()) for one in members)
            rows += [RowPlan(setting, name, WRITTEN[method], cells) for name, cells in own.items()]
    facts = {"name": "toy", "title": "A toy table", "note": "A note.", "dataset": "mvtec"} | changes
    return TablePlan(**facts, rows=tuple(rows))


def published(row: str, method: str, metric: str, value: float, std: float | None = None, **changes) -> PublishedNumber:
    facts = {"table": "toy", "dataset": "mvtec", "setting": "multi_class"} | changes
    return PublishedNumber(**facts, row=row, method=method, metric=metric, value=value, std=std)


def sweep(
    values: Sequence = (0.01, 0.1), methods: Sequence[str] = ("bgad",), option="loss.beta", **changes
) -> SweepPlan:
    points = [
        SweepPoint(method, v, tuple(cell("carpet", method, seed, overrides=((option, v),)) for seed in (0, 1)))
        for method in methods
        for v in values
    ]
    facts = {"name": "swept", "title": "A sweep", "label": "beta", "note": "", "dataset": "mvtec", "logarithmic": True}
    return SweepPlan(**(facts | changes), points=tuple(points))
