"""Safetensors files whose names are not UTF-8 read as all others do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save

from fastbgad.errors import CheckpointError
from fastbgad.system.checkpoint import load_checkpoint, save_checkpoint
from fastbgad.system.tensor_file import read_safetensors

NAME = os.fsdecode(b"k\xe4rn.safetensors")


@pytest.mark.parametrize("name", ["plain.safetensors", NAME])
@pytest.mark.parametrize("metadata", [{}, {"a": "b \xe4"}])
def test_tensors_and_metadata(tmp_path: Path, name: str, metadata: dict[str, str]) -> None:
    tensors = {"one": torch.arange(3.0), "two": torch.zeros(2, 2, dtype=torch.bfloat16)}
    (tmp_path / name).write_bytes(save(tensors, metadata))
    found, header = read_safetensors(tmp_path / name)
    assert header == metadata
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_damage_is_an_error_under_any_name(tmp_path: Path) -> None:
    for name in ("plain.safetensors", NAME):
        (tmp_path / name).write_bytes(b"not tensors at all")
        with pytest.raises(SafetensorError):
            read_safetensors(tmp_path / name)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(tmp_path / name, "model")


def test_a_checkpoint_keeps_names_that_are_not_utf8(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / NAME, "model", {"x": torch.ones(2)}, {"names": [NAME]})
    assert load_checkpoint(tmp_path / NAME, "model")[1]["names"] == [NAME]
