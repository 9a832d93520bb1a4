"""Models, checkpoints and scoring of other code: its own where it can be installed, else restated."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastbgad import reference
from fastbgad.convert import convert
from fastbgad.convert.model import ReadOptions
from fastbgad.flow_spec import FlowSpec
from fastbgad.model import BGAD
from fastbgad.model.scoring import official_anomaly_maps
from tests.flows import freia_flow

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


def normalized(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN) / STD


def settle(net: nn.Module, images: Tensor) -> nn.Module:
    """Random weights with the statistics of these images, so that features are neither tiny nor huge."""
    net.train()
    with torch.no_grad():
        for _ in range(20):
            net(normalized(images))
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


def reflecting_resnet18() -> nn.Module:
    """CFLOW-AD's ResNet: torchvision's, its convolutions made anew with reflection padding, without the classifier."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(weights=None)
    net.fc = nn.Identity()
    for name, old in list(net.named_modules()):
        if isinstance(old, nn.Conv2d) and old.padding != (0, 0):
            new = nn.Conv2d(
                old.in_channels,
                old.out_channels,
                old.kernel_size,
                old.stride,
                old.padding,
                padding_mode="reflect",
                bias=False,
            )
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


def our_maps(model: BGAD, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return official_anomaly_maps(model(images), model.image_size)


def options(kind: str) -> ReadOptions:
    return ReadOptions() if kind == "anomalib" else SMALL


def assert_same_decoders(ours: Sequence[Mapping[str, Tensor]], theirs: Sequence[Mapping[str, Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key, tensor in b.items():
            assert torch.equal(a[key], tensor.to(a[key].dtype)), key
            assert a[key].is_floating_point() == tensor.is_floating_point(), key


def uncalibrated(official: Foreign, folder: Path) -> Path:
    convert(official.path, folder / "plain.safetensors", options=SMALL)
    return folder / "plain.safetensors"
