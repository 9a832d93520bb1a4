"""Arithmetic and memory traffic that the flow needs in any implementation."""

from __future__ import annotations

from fastbgad.bench.roofline import flow_bytes, flow_flops

__all__ = ["LEVELS", "flow_bytes", "flow_flops", "image_bytes", "image_flops"]

# Levels of tf_efficientnet_b6 (indices 1, 2, 3): channels, and pixels of the image per patch a side.
LEVELS = ((40, 4), (72, 8), (200, 16))


def image_flops(pixels: int) -> int:
    """`flow_flops` of all three levels of a square image of `pixels` a side."""
    return sum(flow_flops((pixels // stride) ** 2, channels) for channels, stride in LEVELS)


def image_bytes(pixels: int, bytes_per_feature: int = 4) -> int:
    """`flow_bytes` of all three levels of a square image of `pixels` a side."""
    return sum(flow_bytes((pixels // stride) ** 2, channels, bytes_per_feature) for channels, stride in LEVELS)
