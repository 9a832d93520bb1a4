"""The detector as one graph: the model's results, from plain operations whose number no image size changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.export import Dim

from fastbgad.config import FlowConfig
from fastbgad.export.check import check_images, outputs_of
from fastbgad.export.graph import ExportedDetector, ExportedFlow
from fastbgad.flow_spec import FlowSpec
from fastbgad.model import BGAD
from fastbgad.model.flow import ConditionalFlow
from tests.exports import SMALL, assert_same, batch_of, make_model


@pytest.mark.parametrize(
    ("name", "size", "flow"),
    [
        ("gabor", (65, 97), SMALL),
        ("gabor", (64, 80), FlowConfig(coupling_layers=3, condition_channels=0, hard_permutation=True)),
        ("resnet18", (65, 90), FlowConfig(coupling_layers=2, clamp_form="scaled_tanh", global_affine="SIGMOID")),
        ("resnet18", (64, 64), FlowConfig(coupling_layers=2, hard_permutation=True, global_affine="EXP")),
        ("resnet18", (64, 64), FlowConfig(coupling_layers=1, condition_channels=0)),
    ],
)
def test_the_graph_computes_what_predict_does(name: str, size: tuple[int, int], flow: FlowConfig) -> None:
    model = make_model(name, size, flow)
    images = check_images(size)
    with torch.no_grad():
        found = ExportedDetector(model)(images)
    assert_same(found, model, images)
    assert len(set(outputs_of(model.predict(images))["decision"].flatten().tolist())) == 3


@pytest.mark.parametrize("channels", [2, 5, 24])
@pytest.mark.parametrize("condition_channels", [0, 12])
@pytest.mark.parametrize("hard", [False, True])
def test_the_flow_against_the_oracle(channels: int, condition_channels: int, hard: bool) -> None:
    """In float32, against the oracle in float64; one layer, and the one that leaves its permutation out."""
    for layers in (1, 3):
        flow = ConditionalFlow(FlowSpec(channels, condition_channels, layers, hard_permutation=hard), seed=layers)
        features = torch.randn(2, channels, 3, 5, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            for parameter in flow.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.ones_like(parameter))
            found = ExportedFlow(flow, (3, 5))(features)
            wanted = flow.double().log_likelihood_map(features.double(), impl="reference")
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def operations(module: torch.nn.Module, example: torch.Tensor) -> Counter[str]:
    program = torch.export.export(module, (example,), dynamic_shapes=({0: Dim("batch")},), strict=False)
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def test_nothing_is_unrolled_over_rows_or_pixels() -> None:
    resnet = make_model("resnet18", (64, 64))
    flow = resnet.flow(0)
    counts = [
        operations(ExportedFlow(flow, (side, side)), torch.rand(2, flow.spec.channels, side, side))
        for side in (8, 16, 64)
    ]
    assert counts[0] == counts[1] == counts[2]
    large = BGAD(resnet.backbone, (128, 128), flow=resnet.flow_config)
    large.load_state_dict(resnet.state_dict())
    found = [operations(ExportedDetector(m), batch_of(m.image_size, 2)) for m in (resnet, large)]
    assert found[0] == found[1]
    # Plain PyTorch only, and nothing left of what was folded.
    assert all(name.startswith("aten.") or "getitem" in name for name in found[0])
    assert not [name for name in found[0] if any(part in name for part in ("softplus", "sin.", "cos.", "arange"))]


def test_nan_is_never_normal() -> None:
    broken = make_model("resnet18", (64, 64))
    with torch.no_grad():
        broken.flow(0).weights()[0].global_offset[0] = torch.nan
        found = ExportedDetector(broken)(batch_of(broken.image_size, 2))
    assert torch.isnan(found["image_score"]).all()
    assert (found["image_side"] == 2).all()
    assert (found["decision"] == 2).all()
