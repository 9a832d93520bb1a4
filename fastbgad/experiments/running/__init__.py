"""Running of cells: ledger, claims, workers, the runner of a category, and the forecast of a run."""

from __future__ import annotations

from .cell_runner import CellRunner
from .claims import Claim, Claims
from .dry_run import Forecast, forecast, print_forecast
from .ledger import Failure, Ledger
from .worker import MakeRunner, OpenCategory, Outcome, Report, Runner, Training, trainings_of, work

__all__ = [
    "CellRunner",
    "Claim",
    "Claims",
    "Failure",
    "Forecast",
    "Ledger",
    "MakeRunner",
    "OpenCategory",
    "Outcome",
    "Report",
    "Runner",
    "Training",
    "forecast",
    "print_forecast",
    "trainings_of",
    "work",
]
