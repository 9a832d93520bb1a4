"""One metric of a table as a matrix of rows and methods, for pages, papers and charts."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import PEERS
from .summary import TableRow, TableSummary
from .texts import method_text, ours_text, row_text, setting_text


@dataclass(frozen=True)
class Column:
    """One method."""

    method: str
    """As in published.csv."""
    text: str
    """As readers see it."""
    is_measured: bool
    """False where all its numbers are published only."""


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    setting: str
    """For readers; empty where the whole table has one setting."""
    text: str
    is_mean: bool
    entries: tuple[TableRow | None, ...]
    """One per column; None where there is neither a published number nor a plan to measure one."""
    best: frozenset[int]
    """Columns of the best of our numbers, as printed; empty with fewer than two of them."""

    @property
    def full_text(self) -> str:
        """The row's name, after its setting where the table has several."""
        return f"{self.setting}, {self.text}" if self.setting else self.text


@dataclass(frozen=True)
class Matrix:
    """One metric of a table, by one selection of the epoch."""

    metric: str
    selection: str
    columns: tuple[Column, ...]
    """First the paper's methods, then peers that are measured here, then those whose numbers are published only."""
    lines: tuple[Line, ...]


def matrix_of(summary: TableSummary, metric: str, selection: str) -> Matrix:
    """Return the matrix of a metric and a selection of `SELECTIONS`, without methods that have no number in it."""
    rows = [row for row in summary.rows if row.metric == metric]
    entries = {(row.setting, row.row, row.method): row for row in rows}
    methods = [method for method in summary.methods if any(row.method == method for row in rows)]
    measured = {row.method for row in rows if row.measured is not None}
    # sorted keeps the order of equals: first the paper's methods, then peers that ran here, then published numbers.
    methods = sorted(methods, key=lambda method: (method not in measured, method in PEERS.values()))
    columns = tuple(Column(method, method_text(method), method in measured) for method in methods)
    keys = list(dict.fromkeys((row.setting, row.row) for row in rows))
    settings = {setting for setting, _ in keys}
    # Settings of one mean each need no headings: they are the rows.
    are_rows = len(settings) == len(keys) > 1 and {name for _, name in keys} == {"mean"}
    lines = []
    for setting, name in keys:
        line = tuple(entries.get((setting, name, method)) for method in methods)
        heading = setting_text(setting) if len(settings) > 1 and not are_rows else ""
        text = setting_text(setting) if are_rows else row_text(name)
        is_mean = not are_rows and (name == "mean" or name.endswith(":mean"))
        lines.append(Line(heading, text, is_mean, line, _best(line, selection)))
    return Matrix(metric, selection, columns, tuple(lines))


def _best(line: tuple[TableRow | None, ...], selection: str) -> frozenset[int]:
    means = {}
    for number, row in enumerate(line):
        if row is not None and row.measured is not None and row.measured.of(selection).mean is not None:
            # Numbers that print alike are equally good.
            means[number] = float(ours_text(row.measured, selection).split(" ")[0])
    return frozenset(n for n, mean in means.items() if mean == max(means.values())) if len(means) > 1 else frozenset()
