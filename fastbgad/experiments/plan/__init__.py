"""Plans of experiments: cells, setup, protocols of tables and sweeps, published numbers, folders of data sets."""

from __future__ import annotations

from .cell_split import split_of
from .cells import METRICS, PEERS, Cell, CellResult, Dataset, Value
from .plan import Plan, SweepPlan, TablePlan, cells_of
from .protocol import make_plan, table_names
from .protocol_file import dataset_facts, protocol_source, read_protocol
from .published import PublishedNumber, published
from .setup import Setup
from .sources import CategoryKey, Sources, categories_of, find_sources

__all__ = [
    "METRICS",
    "PEERS",
    "CategoryKey",
    "Cell",
    "CellResult",
    "Dataset",
    "Plan",
    "PublishedNumber",
    "Setup",
    "Sources",
    "SweepPlan",
    "TablePlan",
    "Value",
    "categories_of",
    "cells_of",
    "dataset_facts",
    "find_sources",
    "make_plan",
    "protocol_source",
    "published",
    "read_protocol",
    "split_of",
    "table_names",
]
