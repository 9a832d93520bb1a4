"""Compiling the candidates of a case in parallel before they are measured."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from ..tile_sizes import default_tiles
from ..variants import TuningCase
from .cases import collect
from .measuring import Tiles


class Precompiling:
    """Run every candidate once in separate processes, so that its compiled kernel is in Triton's cache.

    Compiling takes seconds per candidate and holds the interpreter's lock; measuring takes a second or two per case.
    Nothing is compiled while a case is measured: these processes launch the kernels on the same GPU. A candidate that
    fails here fails again, and is reported, where the candidates are measured.
    """

    def __init__(self, kernels: Sequence[str], processes: int) -> None:
        self._kernels = tuple(kernels)
        self._pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))

    def run(self, case: TuningCase) -> None:
        """Return when the candidates of a case have been compiled, or cannot be."""
        tasks = [
            (self._kernels, case.kernel, case.key, dict(tiles))
            for tiles in (default_tiles()[case.kernel][case.key], *case.candidates)
        ]
        for future in [self._pool.submit(_compile, task) for task in tasks]:
            future.exception()

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _compile(task: tuple[Sequence[str], str, str, Tiles]) -> None:
    kernels, kernel, key, tiles = task
    try:
        _prepared(tuple(kernels), kernel, key)(tiles)
        torch.cuda.synchronize()
    except Exception:  # reported where the candidate is measured
        return


@functools.lru_cache(maxsize=1)
def _prepared(kernels: Sequence[str], kernel: str, key: str) -> Callable[[Tiles], Sequence[Tensor]]:
    (case,) = (case for case in collect(kernels) if (case.kernel, case.key) == (kernel, key))
    return case.prepare(torch.device("cuda", torch.cuda.current_device()))
