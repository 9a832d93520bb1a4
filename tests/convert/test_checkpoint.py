"""Forms of one checkpoint that all can be read, and objects in it that are not loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastbgad.convert.checkpoint import read_foreign
from fastbgad.convert.model import ReadOptions, from_model, to_model
from fastbgad.errors import CheckpointError

from .foreign_code import SIZE, SMALL, TOLERANCE, Foreign, assert_same_decoders, our_maps


def test_other_forms_of_the_same_file(official: Foreign, tmp_path: Path) -> None:
    """Data parallel prefixes, one decoder instead of a list, a module list, another precision, no encoder."""
    content = torch.load(official.path, weights_only=True)
    encoder, decoders = content["encoder_state_dict"], content["decoder_state_dict"]
    forms = {
        "parallel": {
            "encoder_state_dict": {f"module.{k}": v for k, v in encoder.items()},
            "decoder_state_dict": [{f"module.{k}": v for k, v in state.items()} for state in decoders],
        },
        "single": {"encoder_state_dict": encoder, "decoder_state_dict": decoders[0]},
        "listed": {
            "encoder_state_dict": encoder,
            "decoder_state_dict": {f"{i}.{k}": v for i, state in enumerate(decoders) for k, v in state.items()},
        },
        "double": {
            "encoder_state_dict": encoder,
            "decoder_state_dict": [{k: v.double() for k, v in state.items()} for state in decoders],
        },
    }
    for name, form in forms.items():
        torch.save(form, tmp_path / f"{name}.pt")
        model = to_model(read_foreign(tmp_path / f"{name}.pt"), SMALL)
        assert len(model.flows) == (1 if name == "single" else 3)
        assert_same_decoders(from_model(model, "bgad")["decoder_state_dict"], decoders[: len(model.flows)])
    torch.save({"decoder_state_dict": decoders}, tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match=r"bare\.pt holds no backbone; give one: --backbone NAME --weights FILE"):
        to_model(read_foreign(tmp_path / "bare.pt"), SMALL)
    torch.save(encoder, tmp_path / "encoder.pth")
    given = ReadOptions("tf_efficientnet_b0", str(tmp_path / "encoder.pth"), image_size=(SIZE, SIZE))
    model = to_model(read_foreign(tmp_path / "bare.pt"), given)
    assert torch.equal(model.backbone.state_dict()["net.conv_stem.weight"], encoder["conv_stem.weight"])


def test_anomalib_without_hyperparameters(anomalib: Foreign, images: Tensor, tmp_path: Path) -> None:
    """The state dict alone, of the module or of its model: what is missing has to be said."""
    state = torch.load(anomalib.path, weights_only=True)["state_dict"]
    torch.save({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}, tmp_path / "x.pt")
    foreign = read_foreign(tmp_path / "x.pt")
    assert foreign.kind == "anomalib"
    with pytest.raises(CheckpointError, match=r"does not name its layers.*--levels 2 3 4"):
        to_model(foreign)
    model = to_model(foreign, ReadOptions(levels=(2, 3), clamp=1.7, image_size=(SIZE, SIZE)))
    assert float((our_maps(model, images) - anomalib.maps).abs().max()) < TOLERANCE


class Unknown:
    """A class that no allow list has, with state, as pickled hyperparameters and callbacks are."""

    def __init__(self) -> None:
        self.level = 3


class Harmful:
    """What a hostile file would do: call a function with arguments of its choice while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return shutil.copyfile, (__file__, self.path)


def test_objects_in_a_checkpoint_stay_inert(anomalib: Foreign, tmp_path: Path) -> None:
    content = torch.load(anomalib.path, weights_only=True)
    content["callbacks"] = {"mine": Unknown(), "path": Path("a/b"), "harmful": Harmful(tmp_path / "proof")}
    content["hyper_parameters"]["transform"] = Unknown()
    torch.save(content, tmp_path / "x.ckpt")
    foreign = read_foreign(tmp_path / "x.ckpt")
    assert not (tmp_path / "proof").exists()
    assert_same_decoders(foreign.decoders, anomalib.decoders)
    assert (foreign.backbone, foreign.layers) == ("resnet18", ("layer2", "layer3"))


@pytest.mark.parametrize("function", [os.system, Path.touch])
def test_what_blocks_a_file(function: Callable, tmp_path: Path) -> None:
    """Functions of modules that PyTorch blocks, and calls of what a call returned, are refused, not replaced."""

    class Worse:
        def __reduce__(self) -> tuple[Callable, tuple]:
            proof = tmp_path / "proof"
            return function, (f"touch {proof}" if function is os.system else proof,)

    torch.save({"state_dict": {}, "callbacks": Worse()}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="not loaded for safety") as caught:
        read_foreign(tmp_path / "x.ckpt")
    assert "weights_only" not in str(caught.value)  # PyTorch's advice to load it unsafely is not passed on
    assert not (tmp_path / "proof").exists()
