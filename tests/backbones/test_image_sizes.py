"""Image sizes that a backbone takes: refused before any work, with sizes nearby that really work."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn

from fastbgad.backbones import Backbone, create_backbone
from fastbgad.backbones.image_sizes import SizeTrial
from fastbgad.backbones.timm_features import TimmBackbone
from fastbgad.config import FlowConfig
from fastbgad.errors import FeatureError
from fastbgad.model import BGAD

GRAY = 0.5


def backbone_of(name: str, **options: object) -> Backbone:
    return create_backbone(name, (1, 2, 3), "random", **options)  # type: ignore[arg-type]


def images_of(height: int, width: int) -> Tensor:
    return torch.full((1, 3, height, width), GRAY)


def sizes_in(message: str) -> list[tuple[int, int]]:
    """The sizes that a message names as working."""
    return [(int(h), int(w)) for h, w in re.findall(r"(\d+) x (\d+)(?= and | works?;)", message)]


@pytest.mark.parametrize(
    ("name", "size", "sizes"),
    [
        ("hrnet_w18_small", (100, 150), "96 x 128 and 128 x 160 work;"),
        ("hrnet_w18_small", (97, 131), "96 x 128 and 128 x 160 work;"),
        ("dla46_c", (100, 150), "96 x 144 and 104 x 152 work;"),
        ("inception_v3", (40, 33), "48 x 48 works;"),  # a map smaller than a kernel
        ("halonet26t", (224, 224), "128 x 128 and 256 x 256 work;"),  # blocks of attention
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_size_that_does_not_fit_names_sizes_that_do(name: str, size: tuple[int, int], sizes: str, dtype: str) -> None:
    backbone = backbone_of(name, dtype=dtype)
    text = rf"{name} cannot take images of {size[0]} x {size[1]} pixels .* Nearby {sizes}"
    for act in (lambda: backbone.check_image_size(*size), lambda: backbone.extract(images_of(*size))):
        with pytest.raises(FeatureError, match=text) as caught:
            act()
    named = sizes_in(str(caught.value))
    assert named
    for height, width in named:
        backbone.check_image_size(height, width)
        if dtype == "float32":
            levels = backbone.extract(images_of(height, width))
            assert [maps.shape[1] for maps in levels] == list(backbone.channels)


@pytest.mark.parametrize(
    ("name", "size", "text"),
    [
        ("hrnet_w18_small", (100, 150), "96 x 128 and 128 x 160 work"),
        ("resnet18", (7, 64), "7 x 64 pixels are too small for this backbone: each side needs at least 16"),
        ("vit_tiny_patch16_224", (256, 256), "takes images of 224 x 224 pixels only, not 256 x 256"),
    ],
)
def test_a_detector_refuses_the_size_when_it_is_made(name: str, size: tuple[int, int], text: str) -> None:
    with pytest.raises(FeatureError, match=text):
        BGAD(backbone_of(name), size, flow=FlowConfig(coupling_layers=1))


def test_a_detector_with_the_filter_bank_refuses_small_images() -> None:
    with pytest.raises(FeatureError, match=r"63 x 64 pixels are too small .* at least 64"):
        BGAD(create_backbone("gabor"), (63, 64))


def test_a_compiled_network_is_tried_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    backbone = backbone_of("hrnet_w18_small", compile=True)
    with pytest.raises(FeatureError, match="96 x 128 and 128 x 160 work"):
        backbone.extract(images_of(100, 150))
    with pytest.raises(FeatureError, match="96 x 128 and 128 x 160 work"):
        backbone.check_image_size(100, 150)


def test_padding_by_reflection() -> None:
    backbone = create_backbone("resnet18", (4,), "random", padding_mode="reflect")
    backbone.check_image_size(64, 64)
    with pytest.raises(FeatureError, match="at least 64"):
        backbone.check_image_size(63, 64)


class Broken(nn.Module):
    """A network that has its features, and an error of its own after them."""

    def __init__(self, net: nn.Module, error: Exception) -> None:
        super().__init__()
        self.net = net
        self.error = error

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.net(images)
        if images.device.type != "meta":
            raise self.error
        return features


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: device-side assert triggered"),
        KeyError("weight"),
    ],
)
def test_errors_that_are_not_of_the_size_stay_as_they_are(error: Exception) -> None:
    backbone = backbone_of("resnet18")
    assert isinstance(backbone, TimmBackbone)
    backbone.net = Broken(backbone.net, error)
    with pytest.raises(type(error)) as caught:
        backbone.extract(images_of(33, 40))
    assert caught.value is error


def test_a_network_that_cannot_be_tried_is_not_refused() -> None:
    """Its failure says nothing about the size: it comes at the first images."""
    backbone = backbone_of("resnet18")
    assert isinstance(backbone, TimmBackbone)
    reason = RuntimeError("not on this device")

    class Never(nn.Module):
        def forward(self, images: Tensor) -> list[Tensor]:
            raise reason

    backbone.net = Never()
    backbone.check_image_size(100, 150)
    with pytest.raises(RuntimeError) as caught:
        backbone.extract(images_of(100, 150))
    assert caught.value is reason


def test_a_trial_leaves_the_network_alone() -> None:
    backbone = backbone_of("mobilenetv3_small_100")
    assert isinstance(backbone, TimmBackbone)
    before = backbone.fingerprint()
    trial = SizeTrial(backbone.net)
    assert trial.works((64, 64))
    assert all(tensor.device.type == "meta" for tensor in trial._net.state_dict().values())
    assert all(tensor.device.type == "cpu" for tensor in backbone.net.state_dict().values())
    backbone.check_image_size(64, 64)
    assert backbone.fingerprint() == before
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert twin.fingerprint() == before


def test_a_network_with_three_dimensional_convolutions() -> None:
    backbone = backbone_of("lambda_resnet26t")
    assert [maps.shape[1] for maps in backbone.extract(images_of(97, 131))] == list(backbone.channels)
