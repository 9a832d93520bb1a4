"""How much arithmetic and memory traffic the flow needs, worked out by hand."""

from __future__ import annotations

from roofline import flow_bytes, flow_flops, image_bytes, image_flops


def test_roofline() -> None:
    """With 40 channels: C1 = C2 = 20, H = 296; per layer 296 * 20 + 40 * 296 + 40 * 40 products."""
    assert flow_flops(1, 40, coupling_layers=1) == 2 * (296 * 20 + 40 * 296)
    assert flow_flops(3, 40, coupling_layers=8) == 3 * 2 * (8 * (296 * 20 + 40 * 296) + 7 * 1600)
    assert flow_flops(1, 41, coupling_layers=1) == 2 * (21 * 298 + 298 * 40)
    assert flow_bytes(10, 40, 2) == 10 * (80 + 4)
    assert image_flops(1024) == sum(flow_flops(n, c) for n, c in ((65536, 40), (16384, 72), (4096, 200)))
    assert image_bytes(64) == 256 * 164 + 64 * 292 + 16 * 804
