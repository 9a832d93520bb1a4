"""Tuning: measures tile sizes of the kernels on this machine's GPU."""

from .cases import MOST_VALUABLE, collect, tune
from .command import main
from .measuring import Refused, Stopwatch, Tiles, Tuned, graph_stopwatch, tune_case
from .precompiling import Precompiling
from .results import describe_machine, output_of, result_table, store

__all__ = [
    "MOST_VALUABLE",
    "Precompiling",
    "Refused",
    "Stopwatch",
    "Tiles",
    "Tuned",
    "collect",
    "describe_machine",
    "graph_stopwatch",
    "main",
    "output_of",
    "result_table",
    "store",
    "tune",
    "tune_case",
]
