"""Copies to a GPU start from pinned memory and do not make the host wait."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbgad.features import FeatureStore
from fastbgad.system.transfers import select_to_device, to_device
from fastbgad.train.data_parallel import DataParallel, SharedRows
from fastbgad.train.level import LevelTrainer
from tests.fake_cuda import GPU, FakeCuda, fake_cuda

__all__ = ["fake_cuda"]
CPU = torch.device("cpu")


def steps(log: list[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Every copy, with whether its source was pinned before and whether the host may go on."""
    pinned = set()
    for kind, tensor, *rest in log:
        if kind == "pin":
            pinned.add(tensor)
        elif kind == "copy":
            yield tensor in pinned, rest[0]


def test_on_a_cpu_nothing_is_copied() -> None:
    rows = torch.arange(6)
    assert to_device(rows, CPU) is rows
    assert torch.equal(select_to_device(10 * rows, torch.tensor([4, 1]), CPU), torch.tensor([40, 10]))


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("count", [0, 5])
def test_to_a_gpu(fake_cuda: FakeCuda, shape: tuple[int, ...], count: int) -> None:
    values, rows = torch.rand(9, *shape).half(), torch.arange(8, 8 - count, -1)
    assert to_device(values, GPU) is values
    assert torch.equal(select_to_device(values, rows, GPU), values[rows])
    assert list(steps(fake_cuda.log)) == [(True, True)] * 2


def test_rows_of_a_training_step(fake_cuda: FakeCuda) -> None:
    """On the stream of the level, whatever their number."""
    trainer = LevelTrainer.__new__(LevelTrainer)
    trainer.store = SimpleNamespace(home=GPU)  # type: ignore[assignment]
    trainer.stream = fake_cuda.new_stream()  # type: ignore[assignment]
    trainer.steps = lambda rows, first_phase: None  # type: ignore[assignment]
    trainer.train(iter([torch.arange(5), torch.arange(100_000)]), False)
    assert list(steps(fake_cuda.log)) == [(True, True)] * 2
    assert [entry[3] for entry in fake_cuda.log if entry[0] == "copy"] == [trainer.stream.name] * 2


def test_features_that_stay_on_the_host(fake_cuda: FakeCuda) -> None:
    """Patches, labels and positions of a step; a wait for any of them would be a wait for all steps before it."""
    store = FeatureStore.__new__(FeatureStore)
    store.device, store.placement = GPU, "memory"
    store.levels, store.masks = [torch.rand(2, 12, 8)], [torch.rand(2, 12) > 0.5]
    trainer = LevelTrainer.__new__(LevelTrainer)
    trainer.store, trainer.device, trainer.level, trainer.height, trainer.width = store, GPU, 0, 3, 4
    spec = SimpleNamespace(condition_channels=8)
    trainer.flow = SimpleNamespace(spec=spec)  # type: ignore[assignment]
    seen = []

    def module(patches: Tensor, where: Any) -> Any:
        seen.append((patches, where.index))
        return SimpleNamespace(log_likelihood=None)

    trainer.module = module  # type: ignore[assignment]
    rows = torch.tensor([3, 20, 14])
    trainer._log_likelihood(rows)
    labels = store.labels(0, rows)
    ((patches, position),) = seen
    assert torch.equal(patches, store.levels[0].flatten(0, 1)[rows])
    assert torch.equal(position, rows % 12)
    assert torch.equal(labels, store.masks[0].flatten()[rows])
    assert list(steps(fake_cuda.log)) == [(True, True)] * 3


def test_order_of_shared_rows(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReachedError(Exception):
        pass

    def gather(values: Tensor, most: int) -> Tensor:
        raise ReachedError

    parallel = DataParallel.__new__(DataParallel)
    monkeypatch.setattr(parallel, "_gather", gather, raising=False)
    shared = SharedRows(torch.arange(2), torch.arange(4), 2)
    lp: Any = SimpleNamespace(device=GPU)
    with pytest.raises(ReachedError):
        parallel.gather_rows(lp, torch.zeros(2), shared)
    assert list(steps(fake_cuda.log)) == [(True, True)]
