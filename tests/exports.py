"""Small calibrated detectors to export, and what their outputs are held against."""

from __future__ import annotations

from typing import Any

import torch

from fastbgad.backbones import create_backbone
from fastbgad.config import FlowConfig
from fastbgad.export.check import check_images, outputs_of
from fastbgad.model import BGAD
from fastbgad.model.scoring import Calibration, calibrate

SMALL = FlowConfig(coupling_layers=2, condition_channels=16)


def make_model(
    name: str, size: tuple[int, int], flow: FlowConfig = SMALL, levels: tuple[int, ...] = (1, 2), **options: Any
) -> BGAD:
    """A model with random flows that takes the images of the check for normal ones: their maps span the whole range."""
    options = {} if name == "gabor" else {"weights": "random", "seed": 1, **options}
    backbone, images = create_backbone(name, levels, **options), check_images(size)
    backbone.fit([images])
    model = BGAD(backbone, size, flow=flow, seed=3).eval()
    with torch.no_grad():
        # The global affine starts with the same scale for all channels and no offset.
        for number, parameter in enumerate(p for p in model.flows.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        maps = model(images)
    found = calibrate(maps, size, beta=0.3, tau=0.1, normalizer=model.normalizer)
    # However alike these patches are, some lie on every side.
    edges = torch.stack([lp.flatten().quantile(torch.tensor([0.5, 0.2])) for lp in maps]) / model.normalizer
    model.set_calibration(Calibration(found.level_max, found.offset, edges))
    return model


def batch_of(size: tuple[int, int], count: int) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(count)) * 0.4 + 0.3


def assert_same(found: dict[str, torch.Tensor], model: BGAD, images: torch.Tensor) -> None:
    wanted = outputs_of(model.predict(images))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        if value.dtype == torch.uint8:
            assert float((found[name] != value).float().mean()) < 1e-3
        else:
            torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-4)
