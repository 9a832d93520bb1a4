"""The page of a run of experiments: tables with differences, charts, the qualitative figure, setup and manifest.

One self-contained HTML file: no script, no address outside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...render import plots
from ...render.html_page import css_color, flat_items, render
from ...render.thumbnails import jpeg_address
from ...system.files import write_text
from ...wording import count, duration
from ..plan import METRICS, Cell, CellResult, Plan, Setup
from .charts import Drawing
from .matrix import Matrix, matrix_of
from .pictures import Example
from .summary import SELECTIONS, Measured, Summary, SweepSummary, TableRow, TableSummary
from .texts import DATASETS, MISSING, count_text, method_text, ours_text, published_text, row_text, signed, value_text

_TITLE = "The paper's experiments, reproduced"
# Percentage points from which a difference gets the next stronger color.
_STEPS = (0.1, 0.5, 2.0)
_MOST_ENTRIES = 12  # of a list in the manifest
_MOST_MISSING = 40  # missing cells that are named


class Section(NamedTuple):
    """A table or sweep and its charts."""

    summary: Summary
    drawings: tuple[Drawing, ...]


def write_page(
    path: Path,
    sections: Sequence[Section],
    results: Mapping[Cell, CellResult],
    examples: Sequence[Example],
    problems: Sequence[str],
    setup: Setup,
    facts: Mapping[str, Any],
) -> None:
    """Write the page.

    Args:
        path: the file to write.
        sections: in the order of the page.
        results: of the sections' cells that have one.
        examples: of the qualitative figure.
        problems: sentences on pictures that cannot be shown.
        setup: of the run.
        facts: of the run, possibly nested.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        OutputError: the file cannot be written; what was there before stays.
    """
    cells = list(dict.fromkeys(cell for section in sections for cell in section.summary.plan.cells))
    measured = [results[cell] for cell in cells if cell in results]
    page = render(
        __package__,
        "reproduce.html.jinja",
        title=_TITLE,
        sections=[_section(section, results) for section in sections],
        examples=[_example(example) for example in examples],
        problems=problems,
        steps=[f"{step:g}" for step in _STEPS],
        setup=_keys({"digest": setup.digest, **setup.as_dict()}),
        facts=_keys(facts),
        recorded=_recorded(measured),
        done=len(measured),
        planned=len(cells),
        seeds=sorted({cell.seed for cell in cells}),
        heat_gradient=", ".join(css_color(color) for color in plots.HEAT_COLORS),
        ground_truth_color=css_color(plots.GROUND_TRUTH_COLOR),
    )
    write_text(path, page)


def _section(section: Section, results: Mapping[Cell, CellResult]) -> dict[str, Any]:
    summary = section.summary
    plan = summary.plan
    missing = [cell for cell in plan.cells if cell not in results]
    is_sweep = isinstance(summary, SweepSummary)
    return {
        "name": plan.name,
        "title": plan.title,
        "note": plan.note,
        "dataset": DATASETS[plan.dataset],
        "is_sweep": is_sweep,
        "done": len(plan.cells) - len(missing),
        "planned": len(plan.cells),
        "duration": _duration(plan, results),
        "missing": [_cell_text(cell) for cell in missing[:_MOST_MISSING]],
        "n_unnamed": max(0, len(missing) - _MOST_MISSING),
        "left_out": () if isinstance(summary, SweepSummary) else summary.left_out,
        "charts": [drawing.chart for drawing in section.drawings],
        "sweep": _sweep_table(summary) if isinstance(summary, SweepSummary) else None,
        "metrics": [] if isinstance(summary, SweepSummary) else list(_metrics(summary, section.drawings)),
    }


def _metrics(summary: TableSummary, drawings: Sequence[Drawing]) -> Iterator[dict[str, Any]]:
    for metric, drawing in zip(summary.metrics, drawings, strict=True):
        grids = [
            {"selection": selection, "heading": heading, **_grid(matrix_of(summary, metric, selection))}
            for selection, heading in SELECTIONS.items()
        ]
        yield {"name": METRICS[metric], "grids": grids, "chart": drawing.chart}


def _grid(matrix: Matrix) -> dict[str, Any]:
    lines, setting = [], ""
    for line in matrix.lines:
        entries = [
            entry
            for number, (column, row) in enumerate(zip(matrix.columns, line.entries, strict=True))
            for entry in _grid_entries(row, column.is_measured, matrix.selection, is_best=number in line.best)
        ]
        heading = line.setting if line.setting != setting else ""
        setting = line.setting
        lines.append({"heading": heading, "text": line.text, "is_mean": line.is_mean, "entries": entries})
    width = 1 + sum(3 if column.is_measured else 1 for column in matrix.columns)
    n_only = sum(not column.is_measured for column in matrix.columns)
    return {"columns": matrix.columns, "lines": lines, "width": width, "n_only": n_only}


def _grid_entries(row: TableRow | None, is_measured: bool, selection: str, is_best: bool) -> Iterator[dict[str, Any]]:
    yield {"kind": "published start" if is_measured else "published", "text": published_text(row)}
    if not is_measured:
        return
    measured = None if row is None else row.measured
    if row is None or measured is None:
        yield from ({"kind": "ours", "text": MISSING}, {"kind": "difference", "text": MISSING})
        return
    yield _ours_entry(measured, selection) | {"best": is_best}
    difference = row.difference(selection)
    text = signed(difference).replace("-", "−") if difference is not None else MISSING
    yield {"kind": f"difference {_strength(difference)}", "text": text}


def _ours_entry(measured: Measured, selection: str) -> dict[str, Any]:
    return {"kind": "ours", "text": ours_text(measured, selection), "count": count_text(measured, selection)}


def _strength(difference: float | None) -> str:
    """Return the CSS class of a difference: better-1 ... better-3, worse-1 ... worse-3, or none for next to nothing."""
    points = 0.0 if difference is None else round(100 * difference, 2)
    step = sum(abs(points) >= limit for limit in _STEPS)
    return f"{'better' if points > 0 else 'worse'}-{step}" if step else ""


def _sweep_table(summary: SweepSummary) -> dict[str, Any]:
    rows = {(row.method, row.value, row.metric): row.measured for row in summary.rows}
    lines = []
    for value in dict.fromkeys(row.value for row in summary.rows):
        for method in summary.methods:
            points = [rows.get((method, value, metric)) for metric in METRICS]
            if not any(points):
                continue
            entries = [
                {"kind": "ours", "text": MISSING} if point is None else _ours_entry(point, selection)
                for selection in SELECTIONS
                for point in points
            ]
            lines.append({"value": value_text(value), "method": method_text(method), "entries": entries})
    return {"label": summary.plan.label, "metrics": list(METRICS.values()), "lines": lines}


def _example(example: Example) -> dict[str, Any]:
    panels = [
        {
            "caption": panel.caption,
            "alt": panel.alt,
            "src": "" if panel.picture is None else jpeg_address(panel.picture),
        }
        for panel in example.panels
    ]
    return {
        "name": f"{DATASETS[example.dataset]}, {row_text(example.category)}",
        "image": example.name,
        "panels": panels,
    }


def _duration(plan: Plan, results: Mapping[Cell, CellResult]) -> str:
    # Cells that share a training share its seconds.
    seconds = {cell.training_key: results[cell].seconds for cell in plan.cells if cell in results}
    return duration(sum(seconds.values())) if seconds else MISSING


def _cell_text(cell: Cell) -> str:
    parts = [cell.category, method_text(cell.method), f"seed {cell.seed}", f"{cell.num_anomalies} known"]
    if cell.known_types is not None:
        parts.append(f"known types {', '.join(cell.known_types)}")
    if cell.test_types is not None:
        parts.append(f"tested types {', '.join(cell.test_types)}")
    parts += [f"{name} {value_text(value)}" for name, value in cell.overrides]
    return " · ".join(parts)


Keys = list[tuple[str, list[tuple[str, str]]]]
"""Argument of the macro `comparison` of page_parts.html.jinja."""


def _keys(tree: Mapping[str, Any]) -> Keys:
    return [(key, [("", _value(value))]) for key, value in flat_items(tree)]


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        text = ", ".join(map(str, value[:_MOST_ENTRIES]))
        return text if len(value) <= _MOST_ENTRIES else f"{text}, … ({len(value)} in all)"
    return str(value)


def _recorded(results: Sequence[CellResult]) -> Keys:
    """Return the recorded machines and versions: each text once, with its number of cells where they differ."""
    counts_by_key: dict[str, dict[str, int]] = {}
    for result in results:
        for key, value in flat_items(result.facts):
            if isinstance(value, str | bool):
                counts = counts_by_key.setdefault(key, {})
                counts[str(value)] = counts.get(str(value), 0) + 1
    return [
        (key, [("" if len(counts) == 1 else count(number, "cell"), text) for text, number in counts.items()])
        for key, counts in counts_by_key.items()
    ]
