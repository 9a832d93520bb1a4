"""The official code's weight files: written, loaded, and refused where they do not fit."""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastbgad.compat import bgad
from fastbgad.errors import CheckpointError, OutputError

from ...flows import freia_flow
from .official_formulas import ARGS, SPEC


def encoder(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))


@pytest.mark.parametrize("theirs", [False, True])
def test_weights_survive_a_file(theirs: bool, tmp_path: Path) -> None:
    decoders = [freia_flow(SPEC, seed).float() if theirs else bgad.conditional_flow_model(ARGS, 7) for seed in (1, 2)]
    source = encoder()
    assert bgad.save_weights(source, decoders, tmp_path / "out", "exp", "model.screw") is None
    path = tmp_path / "out" / "exp" / "weights" / "model.screw.pt"
    content = torch.load(path, weights_only=True)
    assert list(content) == ["encoder_state_dict", "decoder_state_dict"]
    assert list(content["decoder_state_dict"][1]) == list(decoders[1].state_dict())
    mine, freias, copied = [bgad.conditional_flow_model(ARGS, 7) for _ in decoders], [freia_flow(SPEC, 9)], encoder()
    assert bgad.load_weights(copied, mine, str(path)) is None
    for loaded, saved in zip((copied, *mine), (source, *decoders), strict=True):
        assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())
    # A file of one flow that is not in a list, into a flow of FrEIA's.
    bgad.save_weights(source, decoders[0], tmp_path, "exp", "single")
    bgad.load_weights(encoder(), freias, tmp_path / "exp" / "weights" / "single.pt")
    bgad.load_weights(encoder(), freias[0], tmp_path / "exp" / "weights" / "single.pt")
    assert torch.equal(freias[0].state_dict()["module_list.0.w_perm"].float(), mine[0].module_list[0].w_perm)


def test_encoders_of_other_versions_load_in_part(tmp_path: Path) -> None:
    bgad.save_weights(encoder(), [], tmp_path, "exp", "model")
    larger = nn.Sequential(*encoder(), nn.Conv2d(3, 3, 1))
    bgad.load_weights(larger, [], tmp_path / "exp" / "weights" / "model.pt")
    with pytest.raises(CheckpointError, match="no tensor of the encoder"):
        bgad.load_weights(nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False)), [], _emptied(tmp_path))


def _emptied(folder: Path) -> Path:
    torch.save({"encoder_state_dict": {"other": torch.zeros(1)}, "decoder_state_dict": []}, folder / "other.pt")
    return folder / "other.pt"


def test_nothing_is_loaded_from_a_file_that_does_not_fit(tmp_path: Path) -> None:
    def flow(**changes: object) -> bgad.FlowDecoder:
        return bgad.load_flow_model(Namespace(**{**vars(ARGS), **changes}), 7)

    source = encoder()
    bgad.save_weights(source, [flow(), flow()], tmp_path, "exp", "model")
    path = tmp_path / "exp" / "weights" / "model.pt"
    for decoders, words in (
        ([flow()], "2 decoders but 1"),
        ([flow(), flow(coupling_layers=3)], "decoder 1 in .* module_list.2.global_scale is missing"),
        ([flow(), flow(coupling_layers=1)], "module_list.1.global_scale is not expected"),
        ([flow(), flow(pos_embed_dim=4)], r"subnet.0.bias is \[24\] instead of \[16\]"),
        ([flow(), flow(flow_arch="flow_model")], "decoder 1"),
    ):
        target = encoder()
        before = copy.deepcopy([module.state_dict() for module in (target, *decoders)])
        with pytest.raises(CheckpointError, match=words) as caught:
            bgad.load_weights(target, decoders, path)
        assert str(path) in str(caught.value)
        for module, state in zip((target, *decoders), before, strict=True):
            assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    with pytest.raises(CheckpointError, match=r"0.bias is \[3\] instead of \[4\]"):
        bgad.load_weights(encoder(4), [flow(), flow()], path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    path = tmp_path / "exp" / "weights" / "model.pt"
    with pytest.raises(CheckpointError, match="no weights file"):
        bgad.load_weights(encoder(), [], path)
    bgad.save_weights(encoder(), [], tmp_path, "exp", "model")
    whole = path.read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], b"", b"no weights", b"\x80\x02junk"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            bgad.load_weights(encoder(), [], path)
    torch.save(Namespace(run="code"), path)
    with pytest.raises(CheckpointError, match="for safety"):
        bgad.load_weights(encoder(), [], path)
    for content in (torch.zeros(1), {"encoder_state_dict": {}}, {"encoder_state_dict": {}, "decoder_state_dict": [1]}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="no weights file of BGAD"):
            bgad.load_weights(encoder(), [], path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        bgad.save_weights(encoder(), [], tmp_path / "file", "exp", "model")
