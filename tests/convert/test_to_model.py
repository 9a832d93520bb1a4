"""Models from checkpoints of other code compute the maps of that code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastbgad.convert import convert
from fastbgad.convert.checkpoint import read_foreign
from fastbgad.convert.model import ReadOptions, from_model, to_model
from fastbgad.errors import ConfigError
from fastbgad.model import BGAD
from tests.freia_main import freia_main_flow

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
    save_pair,
    states,
    timm_net,
)


@pytest.mark.parametrize(
    ("kind", "backbone", "config"),
    [
        ("bgad", "tf_efficientnet_b0.aa_in1k", {"levels": [1, 2, 3]}),
        ("cflow-ad", "resnet18", {"levels": [2, 3, 4], "padding_mode": "reflect"}),
        ("anomalib", "resnet18", {"levels": [2, 3]}),
    ],
)
def test_the_same_maps(
    kind: str, backbone: str, config: dict, sources: Mapping[str, Foreign], images: Tensor, tmp_path: Path
) -> None:
    source = sources[kind]
    done = convert(source.path, tmp_path / "model.safetensors", options=options(kind))
    assert done.model.backbone.config() == {
        "name": backbone,
        "dtype": "float32",
        "neighborhood": 1,
        "standardize": "none",
        **config,
    }
    loaded = BGAD.load(tmp_path / "model.safetensors")
    maps = our_maps(loaded, images)
    assert source.maps.std() > 0.02  # a map with something on it
    assert float((maps - source.maps).abs().max()) < TOLERANCE
    # and it is the file that counts, not what was in memory
    assert torch.equal(maps, our_maps(done.model, images))
    assert not loaded.calibrated
    assert loaded.history["converted"]["from"] == kind


def test_what_is_found_out(sources: Mapping[str, Foreign], tmp_path: Path) -> None:
    facts = {
        kind: convert(source.path, tmp_path / f"{kind}.safetensors").facts | {"read": "", "wrote": ""}
        for kind, source in sources.items()
    }
    assert "tensors matched" in facts["bgad"]["backbone"]
    assert "later stages not needed" in facts["bgad"]["backbone"]
    assert facts["cflow-ad"]["backbone"].startswith("resnet18, levels 2, 3, 4, reflect padding")
    assert [facts[kind]["channels"] for kind in facts] == ["24, 40, 112", "128, 256, 512", "128, 256"]
    assert {fact["position"] for fact in facts.values()} == {"16 channels"}
    assert {fact["coupling layers"] for fact in facts.values()} == {"2"}
    assert [facts[kind]["permutation"] for kind in facts] == ["soft", "soft", "hard, as matrices"]
    assert facts["bgad"]["clamp"].startswith("1.9 (assumed")
    assert facts["anomalib"]["clamp"] == "1.7 (from the file)"
    assert facts["bgad"]["clamp form"].startswith("tanh (assumed")
    assert facts["anomalib"]["clamp form"] == "tanh (anomalib's own blocks have no other)"
    assert [facts[kind]["image size"] for kind in facts] == ["256 x 256", "256 x 256", "64 x 64"]
    assert all("none: predict needs it" in fact["calibration"] for fact in facts.values())


@pytest.mark.parametrize("hard", [False, True])
def test_clamp_options(hard: bool, official: Foreign, images: Tensor, tmp_path: Path) -> None:
    """A flow without positions, of another clamp: the file cannot tell, the options do."""
    encoder = timm_net("resnet18", (1, 2), images)
    decoders = flows((64, 128), clamp=1.2, condition_channels=0, hard_permutation=hard, coupling_layers=3)
    if hard:  # freia_flow makes rotations exact, and thereby gives a permutation signs
        for decoder in decoders:
            for block in decoder.module_list:
                block.w_perm.data.abs_()
                block.w_perm_inv.data.abs_()
    path = save_pair(tmp_path / "x.pt", encoder, decoders)
    model = to_model(read_foreign(path), ReadOptions(image_size=(SIZE, SIZE), clamp=1.2))
    expected = official_maps(encoder(normalized(images)), decoders, conditional=False)
    assert float((our_maps(model, images) - expected).abs().max()) < TOLERANCE
    config = model.flow_config
    assert (config.condition_channels, config.coupling_layers, config.hard_permutation) == (0, 3, hard)
    other = to_model(read_foreign(path), ReadOptions(image_size=(SIZE, SIZE), clamp=1.2, clamp_form="scaled_tanh"))
    assert other.flow_config.clamp_form == "scaled_tanh"
    assert float((our_maps(other, images) - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("soft", [False, True])
def test_the_main_branch_of_freia(soft: bool, images: Tensor, tmp_path: Path) -> None:
    """Its indices give away its clamp form; with rotations it has to be said."""
    encoder = timm_net("resnet18", (1, 2), images)
    decoders: list[nn.Module] = [freia_main_flow(c, POSITION, 2, soft=soft) for c in (64, 128)]
    path = save_pair(tmp_path / "x.pt", encoder, decoders)
    assert decoders[0].state_dict()["module_list.0.w_perm"].is_floating_point() == soft
    given = ReadOptions(image_size=(SIZE, SIZE), clamp_form="scaled_tanh" if soft else None)
    done = convert(path, tmp_path / "model.safetensors", options=given)
    expected = official_maps(encoder(normalized(images)), decoders)
    assert float((our_maps(done.model, images) - expected).abs().max()) < TOLERANCE
    reason = "as asked" if soft else "only FrEIA's main branch stores permutations as indices"
    assert done.facts["clamp form"] == f"scaled_tanh ({reason})"
    # back, through the file
    back = convert(tmp_path / "model.safetensors", tmp_path / "back.pt")
    assert any("FrEIA's main branch" in note for note in back.notes)
    assert_same_decoders(torch.load(tmp_path / "back.pt", weights_only=True)["decoder_state_dict"], states(decoders))
    if not soft:
        with pytest.raises(ConfigError, match="leave --clamp-form out"):
            to_model(read_foreign(path), ReadOptions(clamp_form="tanh"))


@pytest.mark.parametrize(("first", "levels"), [(1, [3, 4]), (2, [4])])
def test_fewer_layers_of_cflow(first: int, levels: list[int], cflow: Foreign, tmp_path: Path) -> None:
    """CFLOW-AD counts its layers from the end."""
    content = torch.load(cflow.path, weights_only=True)
    content["decoder_state_dict"] = content["decoder_state_dict"][first:]
    torch.save(content, tmp_path / "x.pt")
    config = to_model(read_foreign(tmp_path / "x.pt"), SMALL).backbone.config()
    assert (config["levels"], config["padding_mode"]) == (levels, "reflect")


def test_mean_and_std(official: Foreign, images: Tensor, tmp_path: Path) -> None:
    given = ReadOptions(image_size=(SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(0.225, 0.225, 0.225))
    done = convert(official.path, tmp_path / "m.safetensors", options=given)
    loaded = BGAD.load(tmp_path / "m.safetensors")
    assert loaded.backbone.config() | {"mean": [0.5] * 3, "std": [0.225] * 3} == loaded.backbone.config()
    assert torch.equal(our_maps(loaded, images), our_maps(done.model, images))
    assert not torch.equal(our_maps(loaded, images), our_maps(to_model(read_foreign(official.path), SMALL), images))
    back = convert(tmp_path / "m.safetensors", tmp_path / "back.pt")
    assert any("norm_mean is to be [0.5, 0.5, 0.5] and norm_std [0.225, 0.225, 0.225]" in note for note in back.notes)
    config = torch.load(_to(back.model, tmp_path / "x.ckpt"), weights_only=True)["anomalib_pre_processor_config"]
    assert config["transform"]["init_args"]["transforms"][1]["init_args"]["std"] == [0.225] * 3


def _to(model: BGAD, path: Path) -> Path:
    torch.save(from_model(model, "anomalib"), path)
    return path
