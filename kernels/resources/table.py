"""The table of resources: every variant, compiled for every architecture."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .. import variants as variants_package
from ..failure import reason
from ..tile_sizes import TilesError, use_tiles
from ..variants import MODULES, Variant
from .compilation import Resources, ResourcesError, compile_variant

VARIANTS = variants_package.__name__


class Row(NamedTuple):
    """One line of the table: a variant on an architecture."""

    variant: str
    arch: int
    resources: Resources | None  # None where it does not compile
    problem: str  # why it does not
    seconds: float


def collect(only: str = "") -> tuple[list[tuple[str, int, Variant]], list[str]]:
    """Return module, index in its `variants()` and variant of every name that contains `only`; and what is wrong."""
    found, broken = [], []
    for name in MODULES:
        try:
            variants = importlib.import_module(f"{VARIANTS}.{name}").variants()
        except (ImportError, AttributeError, TilesError) as error:
            if only in name:
                broken.append(f"{name}: this kernel module cannot list its variants ({error})")
            continue
        found += [(name, i, variant) for i, variant in enumerate(variants) if only in variant.name]
    names = [variant.name for _, _, variant in found]
    broken += [f"{name}: two variants have this name" for name in sorted(set(names)) if names.count(name) > 1]
    return found, broken


def compile_all(
    jobs: Sequence[tuple[str, int, Variant]], architectures: Sequence[int], tiles_file: Path | None = None
) -> list[Row]:
    """Compile every variant for every architecture, over all cores."""
    tasks = [(module, i, variant.name, arch) for module, i, variant in jobs for arch in architectures]
    workers = max(1, min(len(tasks), len(os.sched_getaffinity(0))))
    # Spawned, not forked: the compiler has threads of its own.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), use_tiles, (tiles_file,)) as pool:
        return list(pool.map(_compile_one, tasks))


def _compile_one(task: tuple[str, int, str, int]) -> Row:
    module, index, name, arch = task
    start = time.perf_counter()
    try:
        resources = compile_variant(importlib.import_module(f"{VARIANTS}.{module}").variants()[index], arch)
    except ResourcesError:
        raise
    except Exception as error:  # a failure of the compiler is a result of this one variant
        return Row(name, arch, None, reason(error), time.perf_counter() - start)
    return Row(name, arch, resources, "", time.perf_counter() - start)


_HEADINGS = ("kernel", "arch", "registers", "stack", "shared", "local in loops", "matrix unit", "seconds")


def _cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for name, arch, needs, _, seconds in rows:
        if needs is None:
            yield (name, f"sm_{arch}", *["-"] * 5, f"{seconds:.1f}")
        else:
            sizes = (needs.registers, needs.stack_bytes, needs.shared_bytes, needs.local_in_loops)
            yield (name, f"sm_{arch}", *map(str, sizes), needs.matrix_unit or "-", f"{seconds:.1f}")


def text_table(rows: Sequence[Row]) -> str:
    """Return the table for a terminal: registers and bytes of stack per thread, bytes of shared memory per program."""
    cells = [_HEADINGS, *_cells(rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pad = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    return "\n".join("  ".join(f(text, n) for f, text, n in zip(pad, row, widths, strict=True)) for row in cells)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the table without its last column, the seconds, in Markdown."""
    cells = [_HEADINGS[:-1], ["---", "---", *["---:"] * (len(_HEADINGS) - 3)], *(row[:-1] for row in _cells(rows))]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
