"""CFLOW-AD: scores that compare across batches, and steps of as many patches as there are."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("anomalib")

from fastbgad.compat.freia.acceleration import AcceleratedFlow
from fastbgad.experiments.peers import cflow_ad
from tests.experiments.peers.conftest import SIZE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from anomalib.models import Cflow


def test_cflow_ad_scores_all_batches_alike() -> None:
    """Recorded in two batches it gives the maps that anomalib gives of one batch; anomalib's own two do not compare."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Cflow("resnet18", pre_trained=False, coupling_blocks=2, visualizer=False)
    for decoder in model.model.decoders:
        for block in decoder.module_list:
            nn.init.normal_(block.global_offset, std=0.3)
    original = copy.deepcopy(model).model.eval()
    images = torch.rand(5, 3, *SIZE) * torch.linspace(0.2, 2, 5).view(5, 1, 1, 1)
    expected = original(images).anomaly_map

    recorder = cflow_ad.prepare(model, SIZE, batch_size=5)
    model.eval()
    for part in images.split(3):
        assert model.model(part).anomaly_map.shape == (len(part), *SIZE)
    tolerance = 1e-4 * float(expected.max())
    torch.testing.assert_close(recorder.maps(SIZE), expected, rtol=0, atol=tolerance)
    apart = torch.cat([original(part).anomaly_map for part in images.split(3)])
    assert (apart - expected).abs().max() > 100 * tolerance


def test_cflow_ad_takes_as_many_patches_as_there_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Cflow("resnet18", pre_trained=False, coupling_blocks=1, visualizer=False)
    cflow_ad.prepare(model, (70, 64), batch_size=4)
    assert model.model.fiber_batch_size == 4 * 3 * 2  # layer4 has a cell for every 32 pixels
    assert all(isinstance(flow, AcceleratedFlow) for flow in model.model.decoders)
