"""Images, data and checkpoints of each kind that the tests of conversion share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tests.make_data import make_mvtec

from .foreign_code import (
    SIZE,
    Foreign,
    anomalib_model,
    flows,
    hooked,
    normalized,
    official_maps,
    reflecting_resnet18,
    save_lightning,
    save_pair,
    settle,
    states,
    timm_net,
)


@pytest.fixture(scope="package")
def images() -> Tensor:
    """Four images, each of its own contrast, so that their patches differ in likelihood."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator).float()
    smooth = interpolate(interpolate(noise, size=(8, 8), mode="area"), size=(SIZE, SIZE), mode="bilinear")
    return (0.3 * noise + 0.7 * smooth).to(torch.uint8)


@pytest.fixture(scope="package")
def official(tmp_path_factory: pytest.TempPathFactory, images: Tensor) -> Foreign:
    """The official BGAD with a small EfficientNet of its default's family, which is saved whole."""
    encoder, decoders = timm_net("tf_efficientnet_b0", (1, 2, 3), images), flows((24, 40, 112))
    path = save_pair(tmp_path_factory.mktemp("official") / "official.pt", encoder, decoders)
    return Foreign(path, official_maps(encoder(normalized(images)), decoders), states(decoders))


@pytest.fixture(scope="package")
def cflow(tmp_path_factory: pytest.TempPathFactory, images: Tensor) -> Foreign:
    encoder, decoders = settle(reflecting_resnet18(), images), flows((128, 256, 512))
    path = save_pair(tmp_path_factory.mktemp("cflow") / "cflow.pt", encoder, decoders)
    features = hooked(encoder, ("layer2", "layer3", "layer4"), normalized(images))
    return Foreign(path, official_maps(features, decoders), states(decoders))


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
def sources(official: Foreign, cflow: Foreign, anomalib: Foreign) -> dict[str, Foreign]:
    return {"bgad": official, "cflow-ad": cflow, "anomalib": anomalib}


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, normals=4, per_type=2, size=SIZE)
    return root
