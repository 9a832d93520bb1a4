"""Errors for checkpoints that are damaged, incomplete or of other models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbgad.convert import convert
from fastbgad.convert.checkpoint import read_foreign
from fastbgad.convert.model import to_model
from fastbgad.errors import BackboneError, CheckpointError, FastBGADError

from .foreign_code import Foreign


def spoil(change: Callable[[dict[str, Any]], object], content: dict[str, Any], path: Path) -> Path:
    change(content)
    torch.save(content, path)
    return path


def block(content: dict[str, Any]) -> dict[str, Tensor]:
    return content["decoder_state_dict"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(decoder_state_dict=[]), "has no flows in its decoder_state_dict"),
        (lambda c: c.update(decoder_state_dict=[3]), "decoder 1 is no dict of tensors"),
        (lambda c: c.update(encoder_state_dict={"a": 1}), "encoder_state_dict is no dict of tensors"),
        (lambda c: c["decoder_state_dict"].pop(0), r"take 40, 112 channels, but .* has 24, 40 at levels 1, 2"),
        (
            lambda c: c.update(decoder_state_dict={"0.a": torch.ones(1), "2.a": torch.ones(1)}),
            "lacks the flow of level 1",
        ),
        (lambda c: block(c).pop("module_list.0.w_perm"), "flow 2, coupling layer 0 lacks .* w_perm"),
        (lambda c: block(c).update({"module_list.0.extra": torch.ones(1)}), "flow 2, coupling layer 0 .* extra"),
        (lambda c: block(c).update({"linear.weight": torch.ones(1)}), "has linear.weight, which belongs to no Sequen"),
        (lambda c: block(c).update({"module_list.0.vk_householder": torch.ones(1)}), "Householder reflections"),
        (lambda c: block(c).update({"module_list.0.global_scale": torch.ones(1, 40, 1, 1)}), "works on images"),
        (
            lambda c: block(c).update({"module_list.1.subnet.0.bias": torch.ones(7)}),
            r"subnet.0.bias \[7\] instead of \[72",
        ),
        (
            lambda c: block(c).update({"module_list.1.subnet.2.bias": torch.full((40,), torch.nan)}),
            "NaN or Inf in subnet",
        ),
        (lambda c: block(c).update({"module_list.0.w_perm": torch.zeros(40).long()}), "w_perm_inv .* instead of"),
        (
            lambda c: block(c).update({f"module_list.0.w_perm{n}": torch.zeros(40).long() for n in ("", "_inv")}),
            "stores indices that are no permutation",
        ),
        (
            lambda c: block(c).update({f"module_list.0.w_perm{n}": torch.arange(40) for n in ("", "_inv")}),
            "some permutations as indices and some as matrices",
        ),
        (
            lambda c: [block(c).pop(key) for key in list(block(c)) if key.startswith("module_list.0.")],
            r"coupling layers \[1\], which are not all from 0",
        ),
        (
            lambda c: [block(c).pop(key) for key in list(block(c)) if key.startswith("module_list.1.")],
            r"flows differ in coupling layers \(2, 1, 2\)",
        ),
        (lambda c: c["encoder_state_dict"].pop("conv_stem.weight"), "none that convert recognizes.*--backbone NAME"),
        (lambda c: c["encoder_state_dict"].update({"conv_head.weight": torch.ones(1)}), "CFLOW-AD .* is no ResNet"),
        (lambda c: c["encoder_state_dict"].pop("blocks.1.0.conv_pw.weight"), "lacks 1 of .* blocks.1.0.conv_pw.weight"),
        (
            lambda c: c["encoder_state_dict"].update({"blocks.1.0.conv_pw.weight": torch.ones(96, 15, 1, 1)}),
            "none that convert recognizes",
        ),
    ],
)
def test_spoilt_files(change: Callable[[dict], object], message: str, official: Foreign, tmp_path: Path) -> None:
    path = spoil(change, torch.load(official.path, weights_only=True), tmp_path / "spoilt.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(path, tmp_path / "out.safetensors")
    assert "spoilt.pt" in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_spoilt_lightning_files(anomalib: Foreign, tmp_path: Path) -> None:
    cases: list[tuple[Callable[[dict], object], str]] = [
        (lambda c: c["hyper_parameters"].update(layers=("layer1", "layer2", "layer3")), "3 layers .* 2 flows"),
        (lambda c: c["hyper_parameters"].update(layers=("layer2", "head")), "from head of resnet18"),
        (lambda c: c["hyper_parameters"].update(layers=("layer1", "layer2")), "take 128, 256 channels"),
        (lambda c: c["hyper_parameters"].update(backbone="resnet50"), r"take 128, 256 channels, but resnet50"),
        (lambda c: c.update(state_dict={"model.memory_bank": torch.ones(3)}), "holds model.memory_bank and no flows"),
    ]
    for change, message in cases:
        path = spoil(change, torch.load(anomalib.path, weights_only=True), tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError, match=message):
            to_model(read_foreign(path))
    path = spoil(
        lambda c: c["hyper_parameters"].update(backbone="my_net"),
        torch.load(anomalib.path, weights_only=True),
        tmp_path / "x.ckpt",
    )
    with pytest.raises(BackboneError, match="no backbone 'my_net'"):
        to_model(read_foreign(path))


def test_other_files(official: Foreign, tmp_path: Path) -> None:
    whole = official.path.read_bytes()
    files = {
        "empty.pt": b"",
        "text.pt": b"no checkpoint at all",
        "cut.pt": whole[: len(whole) // 2],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read"):
            convert(tmp_path / name, tmp_path / "out.safetensors")
    for name, value in {
        "list.pt": [1, 2],
        "tensor.pt": torch.ones(2),
        "other.pt": {"model": {}},
        "none.pt": {},
    }.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name} holds .* and no flows"):
            convert(tmp_path / name, tmp_path / "out.safetensors")
    for name in ("missing.pt", "missing.safetensors"):
        with pytest.raises(CheckpointError, match=rf"no checkpoint at .*{name}"):
            convert(tmp_path / name, tmp_path / "out.pt" if name.endswith("rs") else tmp_path / "out.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678{")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors is damaged"):
        convert(tmp_path / "bad.safetensors", tmp_path / "out.pt")


def test_every_error_is_one_of_ours(official: Foreign, tmp_path: Path) -> None:
    """Bytes changed anywhere: an error that names the file, or all flows in their shapes."""
    whole, intact, path = bytearray(official.path.read_bytes()), read_foreign(official.path), tmp_path / "x.pt"
    header = whole.find(b"data.pkl")
    offsets = [*range(0, 60, 3), *range(header, header + 4000, 157), *range(len(whole) - 300, len(whole), 13)]
    errors = []
    for offset in offsets:
        spoilt = bytearray(whole)
        spoilt[offset] ^= 0x55
        path.write_bytes(spoilt)
        try:
            foreign = read_foreign(path)
        except FastBGADError as error:
            errors.append(str(error))
        else:
            assert (foreign.kind, foreign.flows) == (intact.kind, intact.flows), offset
    assert 0 < len(errors) < len(offsets)
    assert all(str(path) in error for error in errors)
