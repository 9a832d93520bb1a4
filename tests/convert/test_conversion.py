"""Checkpoints of other code: files made by that code itself become models that compute the same, and go back bit-equal.

The official BGAD's and CFLOW-AD's scoring is re-stated here; anomalib scores by itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastbgad import reference
from fastbgad.__main__ import main
from fastbgad.backbones import create_backbone
from fastbgad.convert import convert
from fastbgad.convert.checkpoint import read_foreign
from fastbgad.convert.model import ReadOptions, from_model, to_model
from fastbgad.data import open_category
from fastbgad.errors import BackboneError, CheckpointError, ConfigError, FastBGADError, OutputError
from fastbgad.evaluate.evaluation import evaluate_model
from fastbgad.flow_spec import FlowSpec
from fastbgad.model import BGAD
from fastbgad.model.scoring import official_anomaly_maps
from tests.flows import freia_flow
from tests.freia_main import freia_main_flow
from tests.make_data import make_mvtec

SIZE = 64
POSITION = 16
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
TOLERANCE = 1e-5  # of maps that span [0, number of levels]
SMALL = ReadOptions(image_size=(SIZE, SIZE))


class Foreign(NamedTuple):
    """A checkpoint file, and the maps that its own code computes."""

    path: Path
    maps: Tensor
    decoders: list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Four images, each of its own contrast, so that their patches differ in likelihood."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator).float()
    smooth = interpolate(interpolate(noise, size=(8, 8), mode="area"), size=(SIZE, SIZE), mode="bilinear")
    return (0.3 * noise + 0.7 * smooth).to(torch.uint8)


def normalised(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN) / STD


def settle(net: nn.Module, images: Tensor) -> nn.Module:
    """Random weights with the statistics of these images, so that features are neither tiny nor huge."""
    net.train()
    with torch.no_grad():
        for _ in range(20):
            net(normalised(images))
    return net.eval().requires_grad_(False)


def flows(channels: Sequence[int], **changes: Any) -> list[nn.Module]:
    """FrEIA 0.2 flows whose log-likelihoods per dimension stay within a few nats."""
    return [
        freia_flow(FlowSpec(c, **{"condition_channels": POSITION, "coupling_layers": 2, **changes}), seed=c).float()
        for c in channels
    ]


@torch.no_grad()
def official_maps(features: Sequence[Tensor], decoders: Sequence[nn.Module], conditional: bool = True) -> Tensor:
    """Maps [B, H, W] as the official BGAD and CFLOW-AD compute them: positions of every patch, one map per level."""
    total = torch.zeros(())
    for e, decoder in zip(features, decoders, strict=True):
        batch, channels, height, width = e.shape
        # CFLOW-AD takes reshape and transpose where the official code permutes: the same rows in the same order.
        rows = e.reshape(batch, channels, height * width).transpose(1, 2).reshape(-1, channels)
        assert torch.equal(rows, e.permute(0, 2, 3, 1).reshape(-1, channels))
        position = reference.positional_encoding(POSITION, height, width, torch.float32)
        position = position.repeat(batch, 1, 1, 1).permute(0, 2, 3, 1).reshape(-1, POSITION)
        z, log_det = decoder(rows, [position]) if conditional else decoder(rows)
        lp = (-0.9189385332046727 * channels - 0.5 * (z**2).sum(1) + log_det) / channels
        likelihood = torch.exp(lp - lp.max()).reshape(batch, 1, height, width)
        total = total + interpolate(likelihood, size=(SIZE, SIZE), mode="bilinear", align_corners=True)[:, 0]
    return total.max() - total


def states(decoders: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    return [dict(decoder.state_dict()) for decoder in decoders]


def save_pair(path: Path, encoder: nn.Module, decoders: Sequence[nn.Module]) -> Path:
    """What the official BGAD and CFLOW-AD save."""
    torch.save({"encoder_state_dict": encoder.state_dict(), "decoder_state_dict": states(decoders)}, path)
    return path


def timm_net(name: str, levels: Sequence[int], images: Tensor, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settle(timm.create_model(name, features_only=True, out_indices=tuple(levels)), images)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory, images: Tensor) -> Foreign:
    """The official BGAD with a small EfficientNet of its default's family, which is saved whole."""
    encoder, decoders = timm_net("tf_efficientnet_b0", (1, 2, 3), images), flows((24, 40, 112))
    path = save_pair(tmp_path_factory.mktemp("official") / "official.pt", encoder, decoders)
    return Foreign(path, official_maps(encoder(normalised(images)), decoders), states(decoders))


def reflecting_resnet18() -> nn.Module:
    """CFLOW-AD's ResNet: torchvision's, its convolutions made anew with reflection padding, without the classifier."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(weights=None)
    net.fc = nn.Identity()
    for name, old in list(net.named_modules()):
        if isinstance(old, nn.Conv2d) and old.padding != (0, 0):
            new = nn.Conv2d(
                old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding,
                padding_mode="reflect", bias=False,
            )  # fmt: skip
            net.set_submodule(name, new)
    return net


def hooked(net: nn.Module, layers: Sequence[str], x: Tensor) -> list[Tensor]:
    """The outputs of some layers, by forward hooks as CFLOW-AD takes them."""
    found: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(layer).register_forward_hook(lambda _m, _i, y, layer=layer: found.update({layer: y}))
        for layer in layers
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return [found[layer] for layer in layers]


@pytest.fixture(scope="module")
def cflow(tmp_path_factory: pytest.TempPathFactory, images: Tensor) -> Foreign:
    encoder, decoders = settle(reflecting_resnet18(), images), flows((128, 256, 512))
    path = save_pair(tmp_path_factory.mktemp("cflow") / "cflow.pt", encoder, decoders)
    features = hooked(encoder, ("layer2", "layer3", "layer4"), normalised(images))
    return Foreign(path, official_maps(features, decoders), states(decoders))


@functools.cache
def anomalib_model(permute_soft: bool = False) -> Any:
    cflow = pytest.importorskip("anomalib.models").Cflow
    torch.manual_seed(0)
    return cflow(
        backbone="resnet18",
        layers=("layer2", "layer3"),
        pre_trained=False,
        condition_vector=POSITION,
        coupling_blocks=2,
        clamp_alpha=1.7,
        permute_soft=permute_soft,
        pre_processor=cflow.configure_pre_processor((SIZE, SIZE)),
    )


def save_lightning(path: Path, module: Any) -> Path:
    """A checkpoint by Lightning's own trainer."""
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def anomalib(tmp_path_factory: pytest.TempPathFactory, images: Tensor) -> Foreign:
    module = anomalib_model()
    settle(module.model.encoder.feature_extractor, images)
    for decoder in module.model.decoders:
        for block in decoder.module_list:
            with torch.no_grad():
                block.global_scale += 0.3 * torch.randn_like(block.global_scale)
                for parameter in block.subnet.parameters():
                    parameter *= 2
    path = save_lightning(tmp_path_factory.mktemp("anomalib") / "model.ckpt", module)
    maps = module.model(module.pre_processor(images.float() / 255)).anomaly_map
    return Foreign(path, maps, states(list(module.model.decoders)))


@pytest.fixture(scope="module")
def sources(official: Foreign, cflow: Foreign, anomalib: Foreign) -> dict[str, Foreign]:
    return {"bgad": official, "cflow-ad": cflow, "anomalib": anomalib}


def our_maps(model: BGAD, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return official_anomaly_maps(model(images), model.image_size)


def options(kind: str) -> ReadOptions:
    return ReadOptions() if kind == "anomalib" else SMALL


# ------------------------------------------------------------------ reading


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
    expected = official_maps(encoder(normalised(images)), decoders, conditional=False)
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
    expected = official_maps(encoder(normalised(images)), decoders)
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


# ------------------------------------------------------------------ writing


def assert_same_decoders(ours: Sequence[Mapping[str, Tensor]], theirs: Sequence[Mapping[str, Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key, tensor in b.items():
            assert torch.equal(a[key], tensor.to(a[key].dtype)), key
            assert a[key].is_floating_point() == tensor.is_floating_point(), key


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
        theirs = official_maps(encoder(normalised(images)), decoders)
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


# --------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, normals=4, per_type=2, size=SIZE)
    return root


def test_command_without_data(official: Foreign, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """An uncalibrated model: evaluate works with the official calibration, everything else says what to do."""
    out = str(tmp_path / "model.safetensors")
    command = ["convert", str(official.path), out, "--image-size", str(SIZE), str(SIZE)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for expected in ("checkpoint of official BGAD", "tf_efficientnet_b0.aa_in1k", "tanh (assumed", "none: predict"):
        assert expected in printed
    assert main(command) == 2
    assert "exists already; choose another file, or --force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    folder = tmp_path / "evaluation"
    evaluate = ["evaluate", "--model", out, "--data", str(data), "--calibration"]
    assert main([*evaluate, "official", "--out", str(folder)]) == 0
    assert "none: the model has no calibration" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "report.html"}
    assert main([*evaluate, "training"]) == 2
    assert "convert ... --data DIR" in capsys.readouterr().err
    assert main(["predict", str(data), "--model", out, "--out", str(tmp_path / "scores")]) == 2
    error = capsys.readouterr().err
    assert "this model has no calibration" in error
    assert "convert ... --data DIR" in error
    assert not (tmp_path / "scores").exists()
    assert main(["info", "--model", out]) == 0
    assert "no calibration" in capsys.readouterr().out


def test_command_with_data(official: Foreign, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "model.safetensors"
    size = ["--image-size", str(SIZE), str(SIZE)]
    assert main(["convert", str(official.path), str(out), *size, "--data", str(data), "--beta", "0.2"]) == 0
    assert "on 4 normal images" in capsys.readouterr().out
    assert main(["predict", str(data / "widget" / "test"), "--model", str(out), "--out", str(tmp_path / "scores")]) == 0
    model = BGAD.load(out)
    assert model.calibrated
    # what an official calibration of the same images gives
    category = open_category(data)
    evaluation = evaluate_model(model, category.test, calibration="official")
    plain = BGAD.load(_uncalibrated(official, tmp_path))
    assert torch.equal(evaluate_model(plain, category.test, calibration="official").maps, evaluation.maps)
    # a model that was converted before is calibrated without its checkpoint
    again = tmp_path / "again.safetensors"
    arguments = ["convert", str(tmp_path / "plain.safetensors"), str(again), "--data", str(data), "--beta", "0.2"]
    assert main(arguments) == 0
    assert torch.equal(BGAD.load(again).boundaries, model.boundaries)
    assert torch.equal(BGAD.load(again).level_max, model.level_max)


def _uncalibrated(official: Foreign, folder: Path) -> Path:
    convert(official.path, folder / "plain.safetensors", options=SMALL)
    return folder / "plain.safetensors"


def test_arguments_that_do_not_fit(official: Foreign, data: Path, tmp_path: Path) -> None:
    model = _uncalibrated(official, tmp_path)
    normals = open_category(data).train
    for call, message in (
        (lambda: convert(official.path, tmp_path / "x.pt"), "only models of fastbgad have the suffix"),
        (lambda: convert(official.path, tmp_path / "x.safetensors", "bgad"), "only models of fastbgad have the suffix"),
        (lambda: convert(model, tmp_path / "x.safetensors"), "a model of fastbgad already; give --data"),
        (lambda: convert(model, tmp_path / "x.pt", normals=normals), "holds no calibration; leave --data out"),
        (lambda: convert(model, tmp_path / "x.pt", options=SMALL), "knows its image_size"),
        (lambda: convert(model, tmp_path / "x.pt", "pytorch"), "to is 'pytorch'"),  # type: ignore[arg-type]
        (lambda: convert(official.path, tmp_path / "x.safetensors", normals=normals, beta=2), "beta"),
        (lambda: ReadOptions(clamp=-1), "clamp is -1"),
        (lambda: ReadOptions(clamp_form="sigmoid"), "clamp_form is 'sigmoid'"),  # type: ignore[arg-type]
        (lambda: ReadOptions(image_size=(0, 3)), "image size"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(OutputError, match="exists already"):
        convert(official.path, model)
    with pytest.raises(OutputError):
        convert(official.path, official.path / "below_a_file.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"plain.safetensors"}


def test_help_teaches(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for expected in ("fastbgad convert official.pt", "--clamp-form {None,tanh,scaled_tanh}", "--calibration official"):
        assert expected in printed


# -------------------------------------------------------------------- errors


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
            "stores a permutation that is none",
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
    """Bytes changed anywhere: a clear error, or a model that is whole."""
    whole = bytearray(official.path.read_bytes())
    header = whole.find(b"data.pkl")
    places = [*range(0, 60, 3), *range(header, header + 4000, 157), *range(len(whole) - 300, len(whole), 13)]
    for place in places:
        spoilt = bytearray(whole)
        spoilt[place] ^= 0x55
        (tmp_path / "x.pt").write_bytes(spoilt)
        with contextlib.suppress(FastBGADError):
            read_foreign(tmp_path / "x.pt")
