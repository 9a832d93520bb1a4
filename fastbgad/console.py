"""What people see in the terminal: progress bars and tables, by rich where it is installed and stdout is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .errors import MissingDependencyError
from .training import Progress

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
def _bar(title: str) -> Iterator[Callable[[str, int, int, str], None]]:
    rich = require_rich()
    if not sys.stdout.isatty():
        yield _lines(title)
        return
    columns = rich.progress
    bar = columns.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(bar_width=24),
        columns.MofNCompleteColumn(),
        columns.TimeRemainingColumn(),
        columns.TextColumn("{task.fields[text]}"),
    )
    with bar:
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
    rich.console.Console(soft_wrap=True).print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Name and value, one pair per line."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
