"""The images of a run: their numbers, their division among processes, and their slots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastbgad.config import TrainConfig
from fastbgad.data import DecodedImages, Split
from fastbgad.errors import DataError, Notice
from fastbgad.train.items import RunItems, check_images, without_vanished
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


def test_images_that_a_method_cannot_be_trained_on(split: Split) -> None:
    maskless = replace(split, known_anomalies=tuple(s._replace(mask=None) for s in split.known_anomalies[:1]))
    none = replace(split, known_anomalies=())
    normal_only = replace(none, test=tuple(s for s in split.test if not s.label))
    for method in ("nfad", "bgad_without"):
        for each in (split, maskless, none, normal_only):
            check_images(each, tiny_config(method))
    for method in ("bgad", "bgad_dagger"):
        check_images(split, tiny_config(method))
        for each, message in (
            (maskless, f"there is no mask of 1 of 1 known anomaly, such as {maskless.known_anomalies[0].image}"),
            (none, "none is known: raise num_anomalies"),
            (normal_only, "none is known: add anomalous images with masks"),
        ):
            with pytest.raises(DataError, match=f"{message}.*--method nfad"):
                check_images(each, tiny_config(method))
    with pytest.raises(DataError, match="no normal image"):
        check_images(replace(split, normals=()), tiny_config("nfad"))


def test_known_anomalies_that_vanish_are_left_out(split: Split, tmp_path: Path) -> None:
    lost, kept = split.known_anomalies
    speck = np.zeros((SIZE, SIZE), np.uint8)
    speck[0, 0] = 255
    Image.fromarray(speck).save(tmp_path / "speck.png")
    lost = lost._replace(mask=tmp_path / "speck.png")
    some, all_ = (replace(split, known_anomalies=known) for known in ((lost, kept), (lost,)))
    decoded = DecodedImages((SIZE // 2, SIZE // 2))
    with pytest.warns(Notice, match="1 of 2 known anomalies are left out of the training: .* vanish at 32 x 32"):
        assert without_vanished(some, tiny_config("bgad"), decoded) == replace(split, known_anomalies=(kept,))
    with pytest.raises(DataError, match=r"no mask of the 1 known anomaly has a pixel left at 32 x 32.*--image-size"):
        without_vanished(all_, tiny_config("bgad"), decoded)
    assert without_vanished(all_, tiny_config("nfad"), decoded) is all_
    assert without_vanished(split, tiny_config("bgad"), decoded) == split
