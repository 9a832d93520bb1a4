"""The arithmetic of the performance page, worked out by hand, and counted by PyTorch where it can be."""

from __future__ import annotations

import floors
import pytest
import torch
from floors import Chip, floor_seconds
from roofline import flow_flops, image_flops
from torch.utils.flop_counter import FlopCounterMode

from fastbgad.flow_spec import FlowSpec
from tests.flows import freia_flow


def test_freia() -> None:
    """40 channels: C1 = 20, H = 2 (20 + 128) = 296; W1 has 296 * 148 = 43808 entries, W2 40 * 296 = 11840."""
    assert floors.freia_flops(1, 40, coupling_layers=1) == 2 * (43808 + 11840 + 1600) == 114_496
    assert floors.freia_flops(3, 40) == 3 * 8 * 114_496 == 2_747_904
    # C1 = 21, C2 = 20, H = 298: 298 * 149 = 44402, 40 * 298 = 11920, 41 * 41 = 1681
    assert floors.freia_flops(1, 41, coupling_layers=2) == 2 * 2 * (44402 + 11920 + 1681) == 232_012
    # 2.99 times what the separable condition needs
    assert flow_flops(1, 40) == 306_560
    assert floors.freia_flops(1, 40) == 915_968


def test_training() -> None:
    """40 channels, two layers: W1's columns over x1 have 20 * 296 = 5920 entries.

    Forward 2 (5920 + 11840) + 1600 = 37120. Backward: W2 twice in both layers 4 * 11840 = 47360, the gradient of W1 in
    both 11840, that of its input in the second 5920, through one permutation 1600: 66720.
    """
    assert floors.training_flops(1, 40, coupling_layers=2) == 2 * (37120 + 66720) == 207_680
    assert floors.training_flops(10, 40, coupling_layers=2) == 2_076_800
    assert floors.training_flops(1, 40) == 885_440


def test_freia_training() -> None:
    """Forward 2 * 57248 = 114496; backward 4 * 11840 + 2 * 43808 + 43808 + 2 * 1600 = 181984."""
    assert floors.freia_training_flops(1, 40, coupling_layers=2) == 2 * (114_496 + 181_984) == 592_960
    assert floors.freia_training_flops(1, 40) == 2_634_688


@pytest.mark.parametrize(("channels", "layers"), [(10, 1), (11, 3)])
def test_what_pytorch_counts_in_freia(channels: int, layers: int) -> None:
    pytest.importorskip("FrEIA")
    flow = freia_flow(FlowSpec(channels, condition_channels=8, coupling_layers=layers))
    x, condition = (torch.randn(5, width, dtype=torch.float64) for width in (channels, 8))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        flow(x, [condition])
    assert forward.get_total_flops() == floors.freia_flops(5, channels, layers, 8)
    with FlopCounterMode(display=False) as both:
        z, log_det = flow(x, [condition])
        (z.square().sum() - log_det.sum()).backward()
    assert both.get_total_flops() == floors.freia_training_flops(5, channels, layers, 8)


def test_floor_seconds() -> None:
    chip = Chip("made up", flops_per_second=100.0, bytes_per_second=10.0)
    assert floor_seconds(1000, 50, chip) == 10
    assert floor_seconds(1000, 200, chip) == 20
    assert not floors.limited_by_memory(1000, 50, chip)
    assert floors.limited_by_memory(1000, 200, chip)


def test_published_rates() -> None:
    """A 1024-pixel image has 65536 + 16384 + 4096 patches.

    72 channels: C1 = 36, H = 328, 8 * (328 * 36 + 72 * 328) + 7 * 72 * 72 = 319680 multiply-adds.
    200 channels: C1 = 100, H = 456, 8 * (456 * 100 + 200 * 456) + 7 * 200 * 200 = 1374400.
    """
    assert flow_flops(1, 72) == 639_360
    assert flow_flops(1, 200) == 2_748_800
    assert image_flops(1024) == 65536 * 306_560 + 16384 * 639_360 + 4096 * 2_748_800 == 41_825_075_200
    h200, *_, l4 = floors.CHIPS
    assert floor_seconds(image_flops(1024), 0, h200) == pytest.approx(42.29e-6, rel=1e-3)
    assert floor_seconds(0, 300_000, l4) == pytest.approx(1e-6)


def test_backbone() -> None:
    """As PyTorch counts it in the backbone itself; 72 pixels do not divide by the stride of 16."""
    from fastbgad.backbones import create_backbone

    backbone = create_backbone("tf_efficientnet_b6", (1, 2, 3), "random", seed=0, standardize="none")
    for pixels in (64, 72):
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            backbone(torch.zeros(1, 3, pixels, pixels, dtype=torch.uint8))
        assert floors.backbone_flops(pixels) == counted.get_total_flops()
    assert floors.backbone_flops(64) == 330_823_872


def test_backbone_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of stride 2 on 8 pixels.

    At 4 x 4: the stem 27 * 56 and the expansion 56 * 112; at 2 x 2: a depthwise 3 x 3 of 112 channels and 112 * 32;
    once: squeeze and excitation 2 * 112 * 14.
    """
    monkeypatch.setattr(floors, "STAGES", ((3, 2, 2, 32, 1),))
    assert floors.backbone_flops(8) == 2 * (24_192 + 100_352 + 4_032 + 14_336 + 3_136) == 292_096


def test_share() -> None:
    backbone = floors.backbone_flops(256)
    assert floors.backbone_share(256) == pytest.approx(backbone / (backbone + image_flops(256)))
    assert 0.5 < floors.backbone_share(256) < 1
