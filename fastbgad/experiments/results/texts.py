"""Names and numbers of the experiments for readers: metrics in percent with two decimals."""

from __future__ import annotations

from ...config import METHOD_NAMES
from ..plan import PEERS, Value
from .summary import Measured, TableRow

MISSING = "-"
"""Text in place of a number that is missing."""

# Names of methods for readers, by their names in published.csv.
_METHODS = {"BGAD_wo": "BGAD w/o", "BGAD_dagger": "BGAD†", "bgad_dagger": "BGAD†"}
_SETTINGS = {
    "multi_class": "Multi-class",
    "one_class": "One-class",
    "hard_subsets": "Hard subsets",
    "unseen_subsets": "Unseen subsets",
}
DATASETS = {"mvtec": "MVTec AD", "btad": "BTAD"}
"""Names of data sets for readers."""


def method_text(method: str) -> str:
    """Return a method of published.csv, of `METHOD_NAMES` or of `PEERS` for readers."""
    return _METHODS.get(method) or METHOD_NAMES.get(method) or PEERS.get(method) or method


def setting_text(setting: str) -> str:
    """Return a setting of published.csv for readers."""
    return _SETTINGS.get(setting, setting.replace("_", " "))


def row_text(row: str) -> str:
    """Return a row of published.csv for readers: "carpet:cut" is "carpet, cut"."""
    text = row.replace(":", ", ").replace("_", " ")
    return "Mean" if text == "mean" else text


def value_text(value: Value) -> str:
    """Return a value of a sweep: on or off for a switch, else the value."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def percent(value: float | None) -> str:
    """Return a metric of [0, 1] in percent."""
    return MISSING if value is None else f"{100 * value:.2f}"


def deviation(value: float | None) -> str:
    """Return a deviation to follow a mean: " ±0.12", or nothing where there is none."""
    return "" if value is None else f" ±{100 * value:.2f}"


def signed(value: float | None) -> str:
    """Return a difference of metrics in percentage points, with its sign."""
    if value is None:
        return MISSING
    text = f"{100 * value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def published_text(row: TableRow | None) -> str:
    """Return the published number with its deviation, as "99.20 ±0.07"."""
    return MISSING if row is None else percent(row.published) + deviation(row.published_std)


def ours_text(measured: Measured, selection: str) -> str:
    """Return mean and deviation, as "98.12 ±0.05"."""
    estimate = measured.of(selection)
    return percent(estimate.mean) + deviation(estimate.std)


def count_text(measured: Measured, selection: str) -> str:
    """Return how much an incomplete number is of: "4/5 seeds", or "12/15 cells" where no seed is complete."""
    if measured.is_complete:
        return ""
    seeds = measured.of(selection).seeds
    if seeds:
        return f"{seeds}/{measured.seeds_planned} seeds"
    return f"{measured.cells}/{measured.cells_planned} cells"
