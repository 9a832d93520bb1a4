"""anomalib's Cflow after `fastbgad.accelerate`: the same maps from whole maps at once, all else as before."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbgad
from fastbgad.backbones.frozen_network import PackedConvolution
from fastbgad.compat.freia.anomalib_cflow import AcceleratedCflow
from fastbgad.errors import UnsupportedFlowError

pytest.importorskip("anomalib")


@pytest.fixture(scope="module")
def original() -> Any:
    """A CflowModel with random weights, and batch normalisations that do something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from anomalib.models.image.cflow.torch_model import CflowModel

    torch.manual_seed(0)
    model = CflowModel(
        "resnet18", ["layer1", "layer2", "layer3"], pre_trained=False, coupling_blocks=2, fiber_batch_size=64
    )
    with torch.no_grad():
        for module in model.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
        for decoder in model.decoders:
            for block in decoder.module_list:
                block.global_offset.normal_(std=0.3)
    return model.eval()


def images(batch: int) -> Tensor:
    return torch.rand(batch, 3, 64, 96, generator=torch.Generator().manual_seed(batch))


def close(found: Any, expected: Any) -> bool:
    """Maps within 1e-4 of their range: the encoder's folded weights are rounded."""
    assert found.anomaly_map.shape == expected.anomaly_map.shape
    assert found.pred_score.shape == expected.pred_score.shape
    scale = expected.anomaly_map.max()
    error = max(
        (found.anomaly_map - expected.anomaly_map).abs().max(), (found.pred_score - expected.pred_score).abs().max()
    )
    return bool(error <= 1e-4 * scale)


@pytest.mark.parametrize("batch", [1, 3])
def test_same_maps(original: Any, batch: int) -> None:
    fast = fastbgad.accelerate(copy.deepcopy(original))
    assert isinstance(fast, AcceleratedCflow)
    assert isinstance(fast, type(original))
    x = images(batch)
    expected = original(x)
    for _ in range(2):  # the second call takes what the first has kept
        assert close(fast(x), expected)
    assert not fast.encoder.training
    assert list(fast.state_dict()) == list(original.state_dict())
    assert close(fastbgad.restore(fast)(x), expected)
    assert type(fast) is type(original)


def test_the_encoder_is_prepared(original: Any) -> None:
    fast = fastbgad.accelerate(copy.deepcopy(original))
    fast(images(1))
    prepared = vars(fast)["_fastbgad"].network
    assert prepared is not fast.encoder.feature_extractor
    assert any(isinstance(module, PackedConvolution) for module in prepared.modules())
    assert not any(isinstance(module, PackedConvolution) for module in fast.modules())


def test_an_encoder_that_changes_is_folded_anew(original: Any) -> None:
    fast = fastbgad.accelerate(copy.deepcopy(original))
    x = images(1)
    before = fast(x).anomaly_map
    state = {name: t.clone() for name, t in original.encoder.state_dict().items()}
    state["feature_extractor.bn1.bias"] += 0.5
    fast.encoder.load_state_dict(state)
    changed = fast(x)
    assert not torch.allclose(changed.anomaly_map, before, rtol=1e-2)
    assert close(changed, fastbgad.restore(copy.deepcopy(fast))(x))


def test_an_encoder_that_cannot_be_traced_runs_as_it_is(original: Any) -> None:
    class Stubborn(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return self.inner(x if x.sum() > 0 else -x)

    fast = copy.deepcopy(original)
    fast.encoder.feature_extractor = Stubborn(fast.encoder.feature_extractor)
    fastbgad.accelerate(fast)
    assert close(fast(images(2)), original(images(2)))
    assert vars(fast)["_fastbgad"].network is fast.encoder.feature_extractor


def test_copies_and_pickles(original: Any) -> None:
    fast = fastbgad.accelerate(copy.deepcopy(original))
    x = images(1)
    expected = fast(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(twin) is type(fast)
        assert close(twin(x), expected)


def test_lightning_model(original: Any) -> None:
    """The Lightning module around it: training steps end in the same parameters, exports see anomalib's own forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from anomalib.data import ImageBatch
        from anomalib.models import Cflow

        module = Cflow(
            backbone="resnet18", layers=["layer2", "layer3"], pre_trained=False, coupling_blocks=2, fiber_batch_size=8
        )
    modules = [module, fastbgad.accelerate(copy.deepcopy(module))]
    assert isinstance(modules[1].model, AcceleratedCflow)
    batch = ImageBatch(image=images(1))
    for one in modules:
        torch.manual_seed(1)
        optimizer = one.configure_optimizers()
        one.optimizers = lambda optimizer=optimizer: optimizer  # type: ignore[misc]
        one.manual_backward = lambda loss: loss.backward()
        one.log = lambda *_, **__: None
        one.training_step(batch)
    for a, b in zip(*(one.model.decoders.parameters() for one in modules), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-6, rtol=1e-4)
    x = images(1)
    exported = torch.export.export(modules[1].model, (x,))
    loops = sum("cat" in str(node.target) for node in exported.graph.nodes)
    assert loops < 20
    assert close(exported.module()(x), modules[0].model(x))


def test_another_anomalib_is_refused(original: Any) -> None:
    strange = copy.deepcopy(original)
    del strange.condition_vector
    with pytest.raises(UnsupportedFlowError, match="lacks condition_vector"):
        fastbgad.accelerate(strange)
    assert type(strange) is type(original)
    assert not isinstance(strange.decoders[0], fastbgad.compat.freia.acceleration.AcceleratedFlow)
