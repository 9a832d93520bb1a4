"""Captured steps: when they are captured, what a replay computes, and what happens where capture is impossible.

The CUDA graph itself is replaced by one that records the function: what is tested is the bookkeeping around it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbgad.train import graph as training_graph
from fastbgad.train.fit import fit
from fastbgad.train.graph import WARM_UP_STEPS, CapturedSteps
from tests.fake_cuda import FakeCuda, fake_cuda
from tests.models import tiny_config, tiny_model, tiny_split

__all__ = ["fake_cuda"]


class Steps:
    """A step that adds up its rows; while it is captured it only notes what to do, as a GPU would."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.total = cuda, 0
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, rows: Tensor, first_phase: bool) -> None:
        def work() -> None:
            self.total += int(rows.sum()) * (10 if first_phase else 1)

        if self.cuda.graph is not None:
            self.cuda.graph.replayed = work
        else:
            self.calls.append((len(rows), first_phase))
            work()


def test_steps_are_captured_by_size_and_phase_and_replayed_with_their_own_rows(fake_cuda: FakeCuda) -> None:
    steps = Steps(fake_cuda)
    captured = CapturedSteps(steps)
    generator = torch.Generator().manual_seed(0)
    expected = 0
    plan = [(5, False), (5, False), (4, False), (5, True)] * 10
    for size, first_phase in plan:
        rows = torch.randint(100, (size,), generator=generator)
        expected += int(rows.sum()) * (10 if first_phase else 1)
        captured(rows, first_phase)
        assert steps.total == expected  # warm-up, the step of the capture, and replays alike
    assert len(fake_cuda.graphs) == 3
    assert len(steps.calls) == 3 * WARM_UP_STEPS
    assert sum(graph.replays for graph in fake_cuda.graphs) == len(plan) - 3 * WARM_UP_STEPS


def test_what_cannot_be_captured_runs_as_usual(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(fake_cuda)
    captured = CapturedSteps(steps)

    @contextmanager
    def refuse(graph: object, **options: Any) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    rows = torch.arange(4)
    for _ in range(WARM_UP_STEPS):
        captured(rows, False)
    with pytest.warns(RuntimeWarning, match=r"cannot be captured as a CUDA graph .*not permitted"):
        captured(rows, False)
    captured(rows, False)
    assert steps.total == (WARM_UP_STEPS + 2) * 6
    assert len(steps.calls) == WARM_UP_STEPS + 2


@pytest.mark.equivalence
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_training_is_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: a run whose steps are replayed ends with the parameters of one whose steps are launched one by one."""
    split = tiny_split(tmp_path)
    flows = []
    for warm_up in (WARM_UP_STEPS, 10**9):
        monkeypatch.setattr(training_graph, "WARM_UP_STEPS", warm_up)
        config = tiny_config(meta_epochs=4)
        model = tiny_model(config).to("cuda")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="training steps cannot be captured")
            fit(model, split, config)
        flows.append(model.flows.state_dict())
    for name, tensor in flows[0].items():
        assert torch.allclose(tensor, flows[1][name], rtol=1e-4, atol=1e-6), name
