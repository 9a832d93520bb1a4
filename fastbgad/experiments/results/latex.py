"""Tables and sweeps for papers: LaTeX files for \\input, with rules of booktabs."""

from __future__ import annotations

from collections.abc import Iterator

from ...wording import printable
from ..plan import METRICS, Plan
from .matrix import Column, Line, Matrix, matrix_of
from .summary import SELECTIONS, Measured, Summary, SweepSummary, TableRow, TableSummary
from .texts import DATASETS, MISSING, count_text, method_text, ours_text, published_text, signed, value_text

_SPECIAL = {letter: rf"\{letter}" for letter in "{}&%$#_"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "−": "$-$",
}
_NEEDS = r"% Needs \usepackage{booktabs} and \usepackage{graphicx}; read it with \input{NAME}."


def escaped(text: str) -> str:
    """Return text with LaTeX's special characters escaped."""
    return "".join(_SPECIAL.get(letter, letter) for letter in printable(text))


def latex_text(summary: Summary) -> str:
    """Return the content of a .tex file: a table for every metric, and for tables for every selection of the epoch."""
    tables = _sweep_tables(summary) if isinstance(summary, SweepSummary) else _tables(summary)
    return "\n\n".join([_NEEDS.replace("NAME", f"{summary.plan.name}.tex"), *tables]) + "\n"


def _tables(summary: TableSummary) -> Iterator[str]:
    plan = summary.plan
    for metric in summary.metrics:
        for selection, heading in SELECTIONS.items():
            matrix = matrix_of(summary, metric, selection)
            caption = f"{_title(plan)}: {METRICS[metric]} in %. {_meaning(selection, heading)}"
            caption += " Bold: the best of our numbers."
            if not all(column.is_measured for column in matrix.columns):
                caption += " Methods with one column are published numbers only."
            if any(
                row.measured and not row.measured.is_complete for line in matrix.lines for row in line.entries if row
            ):
                caption += " Numbers with a count in brackets are of fewer seeds than planned."
            yield _table(caption, f"{plan.name}-{metric}-{selection}", *_grid(matrix))


def _title(plan: Plan) -> str:
    dataset = DATASETS[plan.dataset]
    return plan.title if dataset in plan.title else f"{plan.title} ({dataset})"


def _meaning(selection: str, heading: str) -> str:
    chosen = ", which selects the epoch by the test set, as the official code does" if selection == "best" else ""
    return f"Ours: {heading[0].lower()}{heading[1:]}{chosen}."


def _grid(matrix: Matrix) -> tuple[str, list[str], list[str]]:
    """Return the alignment of the columns, the lines of the heading, and the lines of the body."""
    align = "l" + "".join("rrr" if column.is_measured else "r" for column in matrix.columns)
    first, second, rules, at = [""], [""], [], 2
    for column in matrix.columns:
        width = 3 if column.is_measured else 1
        first.append(rf"\multicolumn{{{width}}}{{c}}{{{escaped(column.text)}}}")
        second += ["published", "ours", "difference"] if column.is_measured else ["published"]
        rules.append(rf"\cmidrule(lr){{{at}-{at + width - 1}}}")
        at += width
    heading = [_line(first), "".join(rules), _line(second)]
    body: list[str] = []
    setting = ""
    for line in matrix.lines:
        if line.setting != setting:
            body += [r"\midrule"] if body else []
            body.append(rf"\multicolumn{{{len(align)}}}{{l}}{{\emph{{{escaped(line.setting)}}}}} \\")
            setting = line.setting
        elif line.is_mean and body:
            body.append(r"\midrule")
        body.append(_line([escaped(line.text), *_numbers(matrix, line)]))
    return align, heading, body


def _numbers(matrix: Matrix, line: Line) -> Iterator[str]:
    for number, (column, row) in enumerate(zip(matrix.columns, line.entries, strict=True)):
        yield from _column_numbers(column, row, matrix.selection, is_best=number in line.best)


def _column_numbers(column: Column, row: TableRow | None, selection: str, is_best: bool) -> Iterator[str]:
    yield _number(published_text(row))
    if not column.is_measured:
        return
    if row is None or row.measured is None:
        yield from ("--", "--")
        return
    ours = _ours(row.measured, selection)
    yield rf"\textbf{{{ours}}}" if is_best else ours
    difference = row.difference(selection)
    yield "--" if difference is None else escaped(signed(difference).replace("-", "−"))


def _ours(measured: Measured, selection: str) -> str:
    count = count_text(measured, selection)
    return _number(ours_text(measured, selection)) + (f" ({escaped(count)})" if count else "")


def _number(text: str) -> str:
    return "--" if text == MISSING else escaped(text)


def _sweep_tables(summary: SweepSummary) -> Iterator[str]:
    plan = summary.plan
    methods = summary.methods
    values = list(dict.fromkeys(row.value for row in summary.rows))
    for metric in METRICS:
        rows = {(row.method, row.value): row for row in summary.rows if row.metric == metric}
        align = "l" + "rr" * len(methods)
        first, second, rules = [escaped(plan.label)], [""], []
        for number, method in enumerate(methods):
            first.append(rf"\multicolumn{{2}}{{c}}{{{escaped(method_text(method))}}}")
            second += ["last epoch", "best on test"]
            rules.append(rf"\cmidrule(lr){{{2 * number + 2}-{2 * number + 3}}}")
        body = []
        for value in values:
            line = [escaped(value_text(value))]
            for method in methods:
                row = rows.get((method, value))
                line += ["--"] * 2 if row is None else [_ours(row.measured, selection) for selection in SELECTIONS]
            body.append(_line(line))
        caption = f"{_title(plan)}: {METRICS[metric]} in %."
        caption += " Best on test selects the epoch by the test set, as the official code does."
        yield _table(caption, f"{plan.name}-{metric}", align, [_line(first), "".join(rules), _line(second)], body)


def _line(texts: list[str]) -> str:
    return " & ".join(texts) + r" \\"


def _table(caption: str, label: str, align: str, heading: list[str], body: list[str]) -> str:
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{escaped(caption)}}}",
            rf"\label{{tab:{label.replace('_', '-')}}}",
            # Wide tables shrink to the line, narrow ones keep their size.
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            *heading,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table*}",
        ]
    )
