"""Checkpoints: round trip, damage, wrong kind."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastbgad.errors import CheckpointError, OutputError
from fastbgad.system.checkpoint import load_checkpoint, save_checkpoint

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor(True),
    "c": torch.ones(2, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "x.safetensors"
    save_checkpoint(target, "model", TENSORS, {"note": "hello", "n": [1, 2.5]})
    return target


def test_round_trip(path: Path) -> None:
    tensors, metadata = load_checkpoint(path, "model")
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert metadata["note"] == "hello"
    assert metadata["n"] == [1, 2.5]


def test_every_flipped_byte_is_noticed(path: Path) -> None:
    """One bit of every byte of header and data in turn: never a silent wrong tensor."""
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            load_checkpoint(path, "model")


@pytest.mark.parametrize("length", [0, 4, 30, -1])
def test_truncated(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path, "model")


def test_missing_foreign_and_wrong_kind(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.safetensors", "model")
    with pytest.raises(CheckpointError, match="a model checkpoint, but a training checkpoint is needed"):
        load_checkpoint(path, "training")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not written by fastbgad"):
        load_checkpoint(tmp_path / "foreign.safetensors", "model")


def test_newer_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbgad.system.checkpoint.FORMAT", 2)
    save_checkpoint(tmp_path / "x.safetensors", "model", {}, {})
    monkeypatch.setattr("fastbgad.system.checkpoint.FORMAT", 1)
    with pytest.raises(CheckpointError, match="upgrade fastbgad"):
        load_checkpoint(tmp_path / "x.safetensors", "model")


def test_unwritable_keeps_what_was_there(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(OutputError):
        save_checkpoint(path / "under_a_file", "model", TENSORS, {})
    assert path.read_bytes() == before


def test_header_is_readable_json(path: Path) -> None:
    """The metadata can be read without fastbgad."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    entry = json.loads(header["__metadata__"]["fastbgad"])
    assert json.loads(entry["metadata"])["kind"] == "model"


def test_same_content_same_bytes(path: Path, tmp_path: Path) -> None:
    for number in range(5):
        save_checkpoint(tmp_path / f"{number}", "model", TENSORS, {"note": "hello", "n": [1, 2.5]})
        assert (tmp_path / f"{number}").read_bytes() == path.read_bytes()
