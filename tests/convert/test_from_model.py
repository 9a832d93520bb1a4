"""Checkpoints for other code: bit-equal where they came from it, and refused where it cannot express the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from fastbgad.backbones import create_backbone
from fastbgad.convert import convert
from fastbgad.convert.model import ReadOptions, from_model
from fastbgad.errors import CheckpointError
from fastbgad.model import BGAD

from .foreign_code import (
    POSITION,
    SIZE,
    SMALL,
    TOLERANCE,
    Foreign,
    assert_same_decoders,
    flows,
    normalized,
    official_maps,
    options,
    our_maps,
    reflecting_resnet18,
    states,
)


@pytest.mark.parametrize("kind", ["bgad", "cflow-ad"])
def test_back_to_a_pair(kind: str, sources: Mapping[str, Foreign], tmp_path: Path) -> None:
    source = sources[kind]
    convert(source.path, tmp_path / "model.safetensors", options=SMALL)
    back = convert(tmp_path / "model.safetensors", tmp_path / "back.pt")  # what it was is what it becomes
    assert back.facts["wrote"].endswith({"bgad": "official BGAD", "cflow-ad": "CFLOW-AD"}[kind])
    content = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_decoders(content["decoder_state_dict"], source.decoders)
    # The foreign code's own modules take everything, and strictly.
    channels = [len(state["module_list.0.global_scale"][0]) for state in source.decoders]
    for decoder, state in zip(flows(channels), content["decoder_state_dict"], strict=True):
        decoder.load_state_dict(state, strict=True)
    if kind == "bgad":
        encoder = timm.create_model("tf_efficientnet_b0", features_only=True, out_indices=(1, 2, 3))
        assert "--backbone_arch tf_efficientnet_b0 --feature_levels 3" in back.notes[0]
        assert "random weights" in back.notes[-1]  # the stages that fastbgad cuts off
    else:
        assert len(back.notes) == 1
        encoder = reflecting_resnet18()
        assert "--enc-arch resnet18 --dec-arch freia-cflow --pool-layers 3" in back.notes[0]
        assert "c.condition_vec = 16" in back.notes[0]
    encoder.load_state_dict(content["encoder_state_dict"], strict=True)
    kept = torch.load(source.path, weights_only=True)["encoder_state_dict"]
    for key, tensor in BGAD.load(tmp_path / "model.safetensors").backbone.net.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(content["encoder_state_dict"][key], kept[key]), key
        assert torch.equal(tensor, kept[key]), key


def test_back_to_anomalib(anomalib: Foreign, images: Tensor, tmp_path: Path) -> None:
    """anomalib loads it strictly and computes the same."""
    from anomalib.models import Cflow

    convert(anomalib.path, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "back.ckpt")
    module = Cflow.load_from_checkpoint(tmp_path / "back.ckpt", strict=True)
    assert_same_decoders(states(list(module.model.decoders)), anomalib.decoders)
    assert module.hparams["clamp_alpha"] == 1.7
    maps = module.model(module.pre_processor(images.float() / 255)).anomaly_map
    assert torch.equal(maps, anomalib.maps)
    # and its pipeline runs as a whole, with the thresholds it does not have yet
    assert module(images.float() / 255).anomaly_map.shape == (4, SIZE, SIZE)


def test_the_official_model_in_anomalib(official: Foreign, images: Tensor, tmp_path: Path) -> None:
    """From one foreign kind to another in one step."""
    from anomalib.models import Cflow

    done = convert(official.path, tmp_path / "x.ckpt", "anomalib", SMALL)
    assert done.facts["wrote"].endswith("anomalib Cflow")
    module = Cflow.load_from_checkpoint(tmp_path / "x.ckpt", strict=True)
    maps = module.model(module.pre_processor(images.float() / 255)).anomaly_map
    assert float((maps - official.maps).abs().max()) < TOLERANCE


@pytest.mark.parametrize(
    ("source", "to", "reasons"),
    [
        (
            "cflow-ad",
            "bgad",
            ["it takes levels 1 to 3, the model has 2, 3, 4", "pad with zeros, the model's with refl"],
        ),
        ("cflow-ad", "anomalib", ["pad with zeros, the model's with reflections"]),
        ("bgad", "cflow-ad", ["torchvision's ResNets, the model has tf_efficientnet_b0.aa_in1k", "with reflections"]),
        ("anomalib", "cflow-ad", ["takes the last levels up to 4, at most three, the model has 2, 3"]),
    ],
)
def test_what_cannot_be_expressed(
    source: str, to: Any, reasons: Sequence[str], sources: Mapping[str, Foreign], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="cannot become a checkpoint of") as caught:
        convert(sources[source].path, tmp_path / "out.pt", to, options(source))
    for reason in reasons:
        assert reason in str(caught.value)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(("kind", "layers"), [("channel", 3), ("whiten", 4)])
def test_standardized_features_in_other_code(kind: Any, layers: int, images: Tensor, tmp_path: Path) -> None:
    """Coupling layers more take the features as they are, in the official code, in anomalib, and back."""
    from anomalib.models import Cflow

    from fastbgad.config import FlowConfig

    backbone = create_backbone("resnet18", (1, 2, 3), "random", standardize=kind, neighborhood=1)
    backbone.fit([images])
    model = BGAD(backbone, (SIZE, SIZE), flow=FlowConfig(2, POSITION))
    for level, decoder in enumerate(flows(backbone.channels)):
        model.flow(level).load_state_dict(decoder.state_dict())
    maps = our_maps(model.eval(), images)
    assert maps.std() > 0.02
    model.save(tmp_path / "model.safetensors", allow_uncalibrated=True)

    done = convert(tmp_path / "model.safetensors", tmp_path / "official.pt", "bgad")
    assert f"--coupling_layers {layers}" in " ".join(done.notes)
    assert any(f"of the {layers} coupling layers standardize" in note for note in done.notes)
    content = torch.load(tmp_path / "official.pt", weights_only=True)
    encoder = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3)).eval()
    encoder.load_state_dict(content["encoder_state_dict"], strict=True)
    decoders = flows(backbone.channels, coupling_layers=layers)
    for decoder, state in zip(decoders, content["decoder_state_dict"], strict=True):
        decoder.load_state_dict(state, strict=True)
    with torch.no_grad():
        theirs = official_maps(encoder(normalized(images)), decoders)
    assert float((theirs - maps).abs().max()) < 3 * TOLERANCE  # the layer's constants are rounded to float32

    convert(tmp_path / "model.safetensors", tmp_path / "anomalib.ckpt")
    module = Cflow.load_from_checkpoint(tmp_path / "anomalib.ckpt", strict=True)
    theirs = module.model(module.pre_processor(images.float() / 255)).anomaly_map
    assert float((theirs - maps).abs().max()) < 3 * TOLERANCE

    back = convert(
        tmp_path / "official.pt",
        tmp_path / "back.safetensors",
        options=ReadOptions("resnet18", image_size=(SIZE, SIZE)),
    )
    assert back.model.backbone.standardization is None
    assert back.model.flow_config.coupling_layers == layers
    assert float((our_maps(back.model, images) - maps).abs().max()) < 3 * TOLERANCE


def test_models_of_fastbgad_alone() -> None:
    from fastbgad.config import FlowConfig

    model = BGAD(create_backbone("gabor"), (SIZE, SIZE), flow=FlowConfig(2, 16))
    with pytest.raises(CheckpointError, match="gabor exists in fastbgad alone"):
        from_model(model, "bgad")
    flow = FlowConfig(2, 0, clamp_form="scaled_tanh", global_affine="EXP")
    model = BGAD(create_backbone("resnet18", (1, 2), "random"), (SIZE, SIZE), flow=flow)
    with pytest.raises(CheckpointError, match=r"SOFTPLUS.*clamp form tanh.*conditioned on the position"):
        from_model(model, "anomalib")
