"""The numbers that the paper's slides publish, from `published.csv`.

One line of that file is one number: table, data set, setting, row, method, metric, value, and the deviation over runs
where the slides print one. Methods, rows and settings are named as `RowPlan` names them.
"""

from __future__ import annotations

import csv
import functools
import io
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any, Final, get_args

from ...errors import DataError
from .cells import METRICS, PEERS, Dataset

RUNNABLE: dict[str, str] = {
    "NFAD": "nfad",
    "BGAD_wo": "bgad_without",
    "BGAD_dagger": "bgad_dagger",
    "BGAD": "bgad",
} | {written: method for method, written in PEERS.items()}
"""Names of methods in a `Cell` by their names in the tables. Methods that are not here cannot be run here."""

TABLES: Final = (
    "unsupervised_vs_bgad",
    "supervised_vs_bgad",
    "btad",
    "one_class",
    "ablation_subsets",
    "ablation_semi_push_pull",
)
"""The tables of the slides, in their order."""

_FILE: Final = "published.csv"


@dataclass(frozen=True)
class PublishedNumber:
    """One number of the slides."""

    table: str
    dataset: Dataset
    setting: str
    """multi_class, one_class, hard_subsets or unseen_subsets."""
    row: str
    """A category, category:type, category:mean, or mean."""
    method: str
    metric: str
    """A key of `fastbgad.experiments.plan.cells.METRICS`."""
    value: float
    """In [0, 1]."""
    std: float | None
    """Deviation over the authors' runs; None where the slides give none."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Setting, row, method and metric: unique within a table."""
        return self.setting, self.row, self.method, self.metric


def published(table: str) -> tuple[PublishedNumber, ...]:
    """Return the published numbers of a table, in the order of the slides; none for a table not in `TABLES`.

    Raises:
        DataError: the installed published.csv is damaged.
    """
    return tuple(number for number in _all_numbers() if number.table == table)


@functools.cache
def _all_numbers() -> tuple[PublishedNumber, ...]:
    return read_published((resources.files(__package__) / _FILE).read_text(encoding="utf-8"))


def read_published(text: str) -> tuple[PublishedNumber, ...]:
    """Read the text of a file like published.csv.

    Raises:
        DataError: other columns, a number outside [0, 1], an unknown table, data set or metric, or two numbers with the
            same table and key.
    """
    reader = csv.DictReader(io.StringIO(text))
    columns = [field.name for field in fields(PublishedNumber)]
    if reader.fieldnames != columns:
        raise DataError(f"{_FILE} has the columns {reader.fieldnames}; it needs {', '.join(columns)}")
    numbers = tuple(_read_line(line, reader.line_num) for line in reader)
    keys = set()
    for number in numbers:
        if (number.table, number.key) in keys:
            raise DataError(f"{_FILE} has two numbers for {number.table}, {', '.join(number.key)}; keep one")
        keys.add((number.table, number.key))
    return numbers


def _read_line(line: dict[str, Any], number: int) -> PublishedNumber:
    if None in line or None in line.values():
        raise DataError(f"line {number} of {_FILE} has more or fewer fields than the first line")
    for column, known in (("table", TABLES), ("dataset", get_args(Dataset)), ("metric", tuple(METRICS))):
        if line[column] not in known:
            raise DataError(f"line {number} of {_FILE}: {column} is {line[column]!r}, not one of {', '.join(known)}")
    try:
        value, std = float(line["value"]), float(line["std"]) if line["std"] else None
    except ValueError as error:
        raise DataError(f"line {number} of {_FILE}: {error}") from error
    if not 0 <= value <= 1 or not (std is None or 0 <= std <= 1):
        raise DataError(f"line {number} of {_FILE} has the value {value} and deviation {std}; both lie in [0, 1]")
    return PublishedNumber(**line | {"value": value, "std": std})
