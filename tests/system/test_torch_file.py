"""Files of torch.save: damaged ones and Python objects are named, nothing in them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastbgad.errors import BackboneError, CheckpointError
from fastbgad.system.torch_file import InertObject, read_torch_file


class Unknown:
    def __init__(self, value: int) -> None:
        self.value = value


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"x": torch.arange(3)})
    assert read_torch_file(path, "remedy")["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02junk"])
@pytest.mark.parametrize("inert", [False, True])
def test_damage(tmp_path: Path, content: bytes, inert: bool) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read.* damaged.*; get another"):
        read_torch_file(tmp_path / "a.pt", "get another", inert_objects=inert)


def test_python_objects(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"x": torch.ones(1), "y": Unknown(1)})
    with pytest.raises(
        BackboneError, match="Python objects besides tensors, which are not loaded for safety; remedy"
    ) as error:
        read_torch_file(path, "remedy", error=BackboneError)
    assert "weights_only" not in str(error.value)
    content = read_torch_file(path, "remedy", inert_objects=True)
    assert isinstance(content["y"], InertObject)
    assert content["x"].tolist() == [1]
