"""Files for readers: CSV and LaTeX, charts, the qualitative figure, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...render.svg import for_paper
from ...system.files import write_text
from ..plan import Cell, CellResult, Plan, Setup, published
from .charts import drawings_of
from .latex import latex_text
from .page import Section, write_page
from .pictures import load_examples, write_figure
from .summary import Summary, summarize
from .tables import csv_text, print_summary

PAGE_FILE = "reproduce.html"
FIGURE_FILE = "qualitative.png"


def write_outputs(
    folder: Path, plans: Sequence[Plan], results: Mapping[Cell, CellResult], setup: Setup, facts: Mapping[str, Any]
) -> list[Path]:
    """Write the results of tables and sweeps. Missing cells are counted and never filled in.

    Args:
        folder: of the run. Written are tables/NAME.csv, tables/NAME.tex, charts/NAME-METRIC.svg, qualitative.png where
            maps were kept, and reproduce.html.
        plans: the tables and sweeps, in the order of the page.
        results: of the cells that have one.
        setup: of the run.
        facts: of the run, possibly nested, for the page's manifest: seeds, versions, machines, ...

    Returns:
        The files, the page last.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed; CSV and LaTeX files are written before that.
        OutputError: a file cannot be written.
    """
    summaries = _summaries(plans, results)
    files = []
    for summary in summaries:
        for suffix, content in (("csv", csv_text(summary)), ("tex", latex_text(summary))):
            files.append(folder / "tables" / f"{summary.plan.name}.{suffix}")
            write_text(files[-1], content)
    sections = [Section(summary, tuple(drawings_of(summary))) for summary in summaries]
    for drawing in (drawing for section in sections for drawing in section.drawings if drawing.svg):
        files.append(folder / "charts" / f"{drawing.name}.svg")
        write_text(files[-1], for_paper(drawing.svg))
    examples, problems = load_examples(folder, plans)
    if examples:
        files.append(folder / FIGURE_FILE)
        write_figure(files[-1], examples)
    files.append(folder / PAGE_FILE)
    write_page(files[-1], sections, results, examples, problems, setup, facts)
    return files


def print_plans(plans: Sequence[Plan], results: Mapping[Cell, CellResult]) -> None:
    """Print the tables and sweeps in the terminal.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    for summary in _summaries(plans, results):
        print_summary(summary)


def _summaries(plans: Sequence[Plan], results: Mapping[Cell, CellResult]) -> list[Summary]:
    return [summarize(plan, results, published(plan.name)) for plan in plans]
