"""The schedule: learning rate by hand, every row exactly once, everything a function of the seed."""

from __future__ import annotations

import math

import pytest
import torch

from fastbgad.config import ScheduleConfig
from fastbgad.errors import ConfigError
from fastbgad.train.schedule import image_batches, learning_rate, patch_chunks


def test_learning_rate_by_hand() -> None:
    config = ScheduleConfig()  # 2e-4, 25 meta epochs, 2 of warm-up, floor 1e-3
    at_two = 2e-7 + (2e-4 - 2e-7) * (1 + math.cos(math.pi * 2 / 25)) / 2
    assert learning_rate(config, 0, 0.0) == pytest.approx(2e-5)
    assert learning_rate(config, 1, 0.0) == pytest.approx((2e-5 + at_two) / 2)
    assert learning_rate(config, 2, 0.0) == pytest.approx(at_two)
    assert learning_rate(config, 2, 0.9) == pytest.approx(at_two)  # constant within a meta epoch, as in the paper
    assert learning_rate(config, 24, 0.0) == pytest.approx(2e-7 + (2e-4 - 2e-7) * (1 + math.cos(math.pi * 24 / 25)) / 2)
    assert learning_rate(ScheduleConfig(warmup_epochs=0), 0, 0.0) == pytest.approx(2e-4)


def test_images_once_per_pass() -> None:
    items = torch.tensor([4, 7, 7, 9, 1])
    batches = image_batches(items, 2, seed=3, pass_index=5)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert sorted(torch.cat(batches).tolist()) == [1, 4, 7, 7, 9]
    again = image_batches(items, 2, seed=3, pass_index=5)
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    many = torch.arange(50)
    orders = [torch.cat(image_batches(many, 8, s, p)).tolist() for s, p in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(("images", "area", "chunk"), [(3, 100, 64), (1, 1, 4096), (2, 2048, 4096), (5, 63, 1000)])
def test_every_patch_once_and_no_small_remainder(images: int, area: int, chunk: int) -> None:
    slots = torch.arange(images) * 10
    chunks = list(patch_chunks(slots, area, chunk, (0, 1, 2, 0)))
    seen = sorted((int(s), int(p)) for slot, position in chunks for s, p in zip(slot, position, strict=True))
    assert seen == [(10 * i, p) for i in range(images) for p in range(area)]
    sizes = [len(slot) for slot, _ in chunks]
    assert max(sizes) <= chunk
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == math.ceil(images * area / chunk)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    list(patch_chunks(torch.arange(3), 10, 7, (0, 0, 0, 0)))
    image_batches(torch.arange(9), 2, 0, 0)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "bad", [{"meta_epochs": 0}, {"lr": 0.0}, {"lr_floor": 2.0}, {"warmup_epochs": 26}, {"chunk_rows": 0}]
)
def test_bad_schedule(bad: dict) -> None:
    with pytest.raises(ConfigError):
        ScheduleConfig(**bad)
