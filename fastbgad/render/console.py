"""Progress bars and tables in the terminal, drawn by rich; plain lines where stdout is no terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import MissingDependencyError
from ..progress import Progress
from ..wording import duration, printable

_WIDEST = 240  # columns of a table in a log file
_LINE_EVERY = 10.0  # seconds between lines where no bar can be drawn (a log file, CI)


def require_rich() -> Any:
    """Return the rich package; raise `MissingDependencyError` where it is not installed."""
    try:
        import rich.console
        import rich.padding
        import rich.progress
        import rich.table
        import rich.text
    except ImportError as error:
        raise MissingDependencyError("rich", "report", "the command line") from error
    return rich


@contextmanager
def training_bar(title: str) -> Iterator[Callable[[Progress], None]]:
    """Show stage, images per second, loss and boundaries; yield the callback for `fastbgad.fit`."""
    with _bar(title) as update:

        def on_progress(progress: Progress) -> None:
            record, text = progress.record, f"{progress.images_per_second:.0f} images/s"
            if "loss" in record:
                edges = " ".join(f"{value:.2f}" for name, value in record.items() if name.startswith("b_n_"))
                text += f"  pass {record['pass']:.0f}  loss {record['loss']:.3f}  b_n {edges}"
            update(progress.stage, progress.done, progress.total, text)

        yield on_progress


@contextmanager
def image_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of images; yield the callback that is given the number of images just done."""
    done, started = 0, time.perf_counter()
    with _bar(title) as update:

        def on_images(count: int) -> None:
            nonlocal done
            done += count
            update("images", done, total, f"{done / (time.perf_counter() - started):.0f} images/s")

        yield on_images


@contextmanager
def check_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of files that are looked at, gone at the end; yield the callback for the numbers done and in all."""
    started = time.perf_counter()
    with _bar(title, transient=True) as update:

        def on_files(done: int, total: int) -> None:
            update("images", done, total, f"{done / (time.perf_counter() - started):.0f} images/s")

        yield on_files


@contextmanager
def pass_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of passes; yield the callback that is given the numbers of passes done and of all passes."""
    with _bar(title) as update:
        yield lambda done, total: update("passes", done, total, "")


@contextmanager
def cell_bar(total: int) -> Iterator[Callable[[int, str], None]]:
    """Show a bar of cells and the time left; yield the callback for the number of cells done and a text.

    The time left is estimated from the cells that any process finished since the first call.
    """
    rich = require_rich()
    pace = _Pace(total)
    if not sys.stdout.isatty():
        lines = _lines("reproduce")

        def on_line(done: int, text: str) -> None:
            lines("cells", done, total, f"{pace.left(done)}  {text}".strip())

        yield on_line
        return
    with _drawn(rich, rich.progress.TextColumn("{task.fields[left]}")) as bar:
        task = bar.add_task("cells", total=total, text="", left="")

        def on_cells(done: int, text: str) -> None:
            bar.update(task, completed=done, text=text, left=pace.left(done))

        yield on_cells


class _Pace:
    """Estimate of the time left, at the pace of the cells finished so far."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.first: tuple[int, float] | None = None
        self.latest = (0, 0.0)

    def left(self, done: int) -> str:
        """Return the time left for readers, empty until a cell is finished."""
        now = time.perf_counter()
        if self.first is None:
            self.first = self.latest = (done, now)
        if done != self.latest[0]:
            self.latest = (done, now)
        cells, seconds = self.latest[0] - self.first[0], self.latest[1] - self.first[1]
        if cells < 1 or done >= self.total:
            return ""
        rest = (self.total - done) * seconds / cells - (now - self.latest[1])
        return f"about {duration(max(rest, 1.0))} left"


def _drawn(rich: Any, time_left: Any, transient: bool = False) -> Any:
    """Return a bar for the terminal: description, bar, number done and in all, time left, text."""
    columns = rich.progress
    return columns.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(bar_width=24),
        columns.MofNCompleteColumn(),
        time_left,
        columns.TextColumn("{task.fields[text]}"),
        transient=transient,
        # Of its own: in the console that rich shares, a bar that was never closed keeps all others from being drawn.
        console=rich.console.Console(),
    )


@contextmanager
def _bar(title: str, transient: bool = False) -> Iterator[Callable[[str, int, int, str], None]]:
    rich = require_rich()
    if not sys.stdout.isatty():
        yield _lines(title)
        return
    with _drawn(rich, rich.progress.TimeRemainingColumn(), transient) as bar:
        task, stage_shown = bar.add_task(title, total=None, text=""), ""

        def update(stage: str, done: int, total: int, text: str) -> None:
            nonlocal stage_shown
            begins = stage != stage_shown
            if begins:
                bar.reset(task, total=total)
                stage_shown = stage
            bar.update(task, completed=done, total=total, description=f"{title} · {stage}", text=text)
            if begins:
                bar.refresh()  # a stage may end before the next regular one

        yield update


def _lines(title: str) -> Callable[[str, int, int, str], None]:
    printed = time.perf_counter()

    def update(stage: str, done: int, total: int, text: str) -> None:
        nonlocal printed
        now = time.perf_counter()
        if now - printed > _LINE_EVERY:
            print(f"{title} · {stage} {done}/{total}  {text}", flush=True)
            printed = now

    return update


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with a title; all columns but the first are aligned right, floats have four decimals, NaN none."""
    rich = require_rich()
    table = rich.table.Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        # Text, not str: a name in square brackets is no markup.
        cells = (decimals(cell) if isinstance(cell, float) else printable(str(cell)) for cell in row)
        table.add_row(*map(rich.text.Text, cells))
    # A file or a pipe has no width: lines need no folding.
    width = None if sys.stdout.isatty() else _WIDEST
    rich.console.Console(soft_wrap=True, width=width).print(table)


def print_columns(rows: Sequence[Sequence[object]], head: Sequence[str] = (), right: Collection[int] = ()) -> None:
    """Print rows in columns without lines, indented; in a terminal the last column is folded at its width.

    Args:
        rows: cells, printed as they are: no markup.
        head: of the columns; none are printed if it is empty.
        right: numbers of the columns that are aligned right.
    """
    rich = require_rich()
    table = rich.table.Table(box=None, pad_edge=False, show_header=bool(head), padding=(0, 2, 0, 0))
    columns = len(rows[0]) if rows else len(head)
    for number in range(columns):
        last = number == columns - 1
        table.add_column(
            head[number] if head else "",
            justify="right" if number in right else "left",
            no_wrap=not last,
            overflow="fold",
            header_style="dim",
        )
    for row in rows:
        table.add_row(*(printable(str(cell)) for cell in row))
    width = None if sys.stdout.isatty() else _WIDEST
    console = rich.console.Console(width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(rich.padding.Padding(table, (0, 0, 0, 2), expand=False))
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def decimals(value: float) -> str:
    """Return a number with four decimals, a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.4f}"


def print_facts(facts: Mapping[str, object]) -> None:
    """Print names and values, one pair per line."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
