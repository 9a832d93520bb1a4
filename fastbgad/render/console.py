"""What people see in the terminal: progress bars and tables, by rich where it is installed and stdout is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import MissingDependencyError
from ..progress import Progress
from ..wording import duration

_WIDEST = 240  # columns of a table in a log file
_LINE_EVERY = 10.0  # seconds between lines where no bar can be drawn (a log file, CI)


def require_rich() -> Any:
    """The rich package, or `MissingDependencyError`."""
    try:
        import rich.console
        import rich.progress
        import rich.table
    except ImportError as error:
        raise MissingDependencyError("rich", "report", "the command line") from error
    return rich


@contextmanager
def training_bar(title: str) -> Iterator[Callable[[Progress], None]]:
    """A callback for `fastbgad.fit`: stage, images per second, loss and boundaries; plain lines without a terminal."""
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
    """A callback that counts images up to `total`."""
    done, started = 0, time.perf_counter()
    with _bar(title) as update:

        def on_images(count: int) -> None:
            nonlocal done
            done += count
            update("images", done, total, f"{done / (time.perf_counter() - started):.0f} images/s")

        yield on_images


@contextmanager
def pass_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A callback that is told how many passes are done, and of how many."""
    with _bar(title) as update:
        yield lambda done, total: update("passes", done, total, "")


@contextmanager
def cell_bar(total: int) -> Iterator[Callable[[int, str], None]]:
    """A callback that is told how many cells of a run are done, and what is being done; the rest is estimated.

    The estimate counts the cells that became done since the first call, by whichever process.
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
    """How long the cells that are left will take, at the pace of those that became done."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.first: tuple[int, float] | None = None
        self.latest = (0, 0.0)

    def left(self, done: int) -> str:
        """For people; empty until there is a pace."""
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


def _drawn(rich: Any, time_left: Any) -> Any:
    """A bar for the terminal: description, bar, how many of how many, a column for the time left, a text."""
    columns = rich.progress
    return columns.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(bar_width=24),
        columns.MofNCompleteColumn(),
        time_left,
        columns.TextColumn("{task.fields[text]}"),
    )


@contextmanager
def _bar(title: str) -> Iterator[Callable[[str, int, int, str], None]]:
    rich = require_rich()
    if not sys.stdout.isatty():
        yield _lines(title)
        return
    with _drawn(rich, rich.progress.TimeRemainingColumn()) as bar:
        task, stage_shown = bar.add_task(title, total=None, text=""), ""

        def update(stage: str, done: int, total: int, text: str) -> None:
            nonlocal stage_shown
            if stage != stage_shown:
                bar.reset(task, total=total)
                stage_shown = stage
            bar.update(task, completed=done, total=total, description=f"{title} · {stage}", text=text)

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
    """A table with a title; numbers are set to the right, in four decimals."""
    rich = require_rich()
    table = rich.table.Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row))
    # A file or a pipe has no width: there, nothing needs to be folded.
    width = None if sys.stdout.isatty() else _WIDEST
    rich.console.Console(soft_wrap=True, width=width).print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Name and value, one pair per line."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
