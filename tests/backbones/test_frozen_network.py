"""A frozen network prepared for a CPU gives what the network gives, or is the network."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fastbgad.backbones.frozen_network import FrozenCopy, PackedConvolution, frozen_network, with_child


def lively(net: nn.Module) -> nn.Module:
    """In evaluation mode, with batch normalizations that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2), (module.weight, 0.5, 1.5),
                    (module.bias, -0.3, 0.3),
                ):  # fmt: skip
                    tensor.uniform_(low, high, generator=generator)
    return net.eval().requires_grad_(False)


def images(batch: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))


def same(found: Any, expected: Any) -> bool:
    """To 1e-5 of the largest value: float32 rounding through some fifty layers."""
    return all(
        a.shape == b.shape and float((a - b).abs().max() / b.abs().max()) < 1e-5
        for a, b in zip(found, expected, strict=True)
    )


class Small(nn.Module):
    """What has to be told apart: a ReLU with and without a second reader, groups, dilation, padding modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU()
        self.shared = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.odd = nn.Conv2d(8, 5, (3, 1), stride=(2, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.relu(self.norm(self.first(x)))
        y = self.shared(x)
        z = self.relu(y) + y  # y is read before its ReLU, too
        return [z, self.odd(self.same(self.reflect(z)))]


@pytest.mark.parametrize("make", [
    Small,
    lambda: timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3)),
    lambda: timm.create_model("resnet50", features_only=True, out_indices=(2, 3, 4)),
    lambda: timm.create_model("mobilenetv3_small_050", features_only=True, out_indices=(1, 2)),
], ids=["small", "resnet18", "resnet50", "mobilenet"])  # fmt: skip
def test_same_results(make: Any) -> None:
    torch.manual_seed(0)
    net = lively(make())
    before = copy.deepcopy(net.state_dict())
    prepared = frozen_network(net, images(1))
    for x in (images(1), images(3), images(2, 96, 80), images(1).to(memory_format=torch.channels_last)):
        assert same(prepared(x), net(x))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not any(isinstance(module, PackedConvolution) for module in net.modules())


def test_what_is_prepared() -> None:
    net = lively(Small())
    prepared: Any = frozen_network(net, images(1))
    packed = {name: module for name, module in prepared.named_modules() if isinstance(module, PackedConvolution)}
    assert {name: module.activation for name, module in packed.items()} == {
        "first": "relu", "shared": "none", "odd": "none"
    }  # fmt: skip
    assert "norm" not in {node.target for node in prepared.graph.nodes}


def test_what_cannot_be_prepared_stays_as_it_is() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x if x.sum() > 0 else -x]

    net = Branching().eval()
    assert frozen_network(net, images(1)) is net
    training = Small()
    assert frozen_network(training, images(1)) is training
    half = lively(Small()).bfloat16()
    assert frozen_network(half, images(1).bfloat16()) is half


def test_a_network_that_would_differ_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedConvolution, "forward", lambda self, x: torch.zeros(1, 8, 64, 64))
    net = lively(Small())
    assert frozen_network(net, images(1)) is net


def test_frozen_copy_follows_the_network() -> None:
    net, kept = lively(Small()), FrozenCopy()
    x = images(1)
    first = kept.of(net, x)
    assert kept.of(net, x) is first
    assert same(first(x), net(x))
    with torch.no_grad():
        net.norm.running_mean += 1
    second = kept.of(net, x)
    assert second is not first
    assert same(second(x), net(x))
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert twin.network is None


def test_with_child() -> None:
    outer = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    other = nn.Identity()
    copied = with_child(outer, "a", other)
    assert copied["a"] is other
    assert copied["b"] is outer["b"]
    assert outer["a"] is not other
