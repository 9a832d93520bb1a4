"""The images of a run: their numbers, their division among processes, and their slots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastbgad.config import TrainConfig
from fastbgad.data import DecodedImages, Split
from fastbgad.train.items import RunItems
from tests.models import SIZE, tiny_config, tiny_split


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return tiny_split(tmp_path / "data")


def items_of(split: Split, config: TrainConfig, parallel: Any = None) -> RunItems:
    return RunItems(split, config, (SIZE, SIZE), DecodedImages((SIZE, SIZE)), parallel)


def test_numbers(split: Split) -> None:
    config = tiny_config("bgad")
    config = replace(config, anomalies=replace(config.anomalies, repeat=2, cut_paste=1))
    items = items_of(split, config)
    normals, known = len(split.normals), len(split.known_anomalies)
    assert items.files == [*split.normals, *split.known_anomalies] == items.own_files
    assert items.first_phase.tolist() == list(range(normals))
    anomalous = items.second_phase.tolist()[normals:]
    # Of each known anomaly twice itself, then what is synthesized from it.
    assert anomalous == [item for k in range(known) for item in (normals + k, normals + k, normals + known + k)]
    assert items.slots.tolist() == [-1] * (normals + 2 * known)
    items.set_file_slots(range(100, 100 + len(items.files)))
    items.set_synthetic_slots(range(known))
    assert items.slots.tolist() == [*range(100, 100 + len(items.files)), *range(known)]


def test_no_anomalies_without_a_method_that_learns_from_them(split: Split) -> None:
    items = items_of(split, tiny_config("nfad"))
    assert items.files == list(split.normals)
    assert items.second_phase.tolist() == items.first_phase.tolist()
    assert items.own_synthetic == []


def test_processes_hold_each_item_once(split: Split) -> None:
    config = tiny_config("bgad")
    whole = items_of(split, config)
    halves = [
        items_of(split, config, SimpleNamespace(owned=lambda items, rank=rank: [i for i in items if i % 2 == rank]))
        for rank in range(2)
    ]
    assert [sample for pair in zip(*(half.own_files for half in halves), strict=False) for sample in pair] == (
        whole.files[: 2 * (len(whole.files) // 2)]
    )
    assert sorted(index for half in halves for index in half.own_synthetic) == whole.own_synthetic
    for half in halves:
        half.set_file_slots(range(len(half.own_files)))
        half.set_synthetic_slots(range(len(half.own_synthetic)))
    assert [(int(a) < 0) != (int(b) < 0) for a, b in zip(halves[0].slots, halves[1].slots, strict=True)] == (
        [True] * len(whole.slots)
    )
