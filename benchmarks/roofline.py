"""How much arithmetic and memory traffic the flow needs, whatever computes it: what measured times are held against."""

from __future__ import annotations

# Levels of tf_efficientnet_b6 (indices 1, 2, 3): channels, and pixels of the image per patch a side.
LEVELS = ((40, 4), (72, 8), (200, 16))


def flow_flops(rows: int, channels: int, coupling_layers: int = 8, condition_channels: int = 128) -> int:
    """Floating-point operations of the flow's matrix products with a separable condition, 2 per multiply-add.

    Per row and layer: W1x [H, C1] and W2 [2 C2, H] of the subnet, W_perm [C, C]; the condition comes from tables. The
    last permutation is not needed for a log-likelihood.
    """
    c2 = channels // 2
    c1 = channels - c2
    hidden = 2 * (c1 + condition_channels)
    subnets = coupling_layers * (c1 * hidden + hidden * 2 * c2)
    permutations = (coupling_layers - 1) * channels * channels
    return 2 * rows * (subnets + permutations)


def flow_bytes(rows: int, channels: int, bytes_per_feature: int = 4) -> int:
    """Bytes that must cross the device memory: features in, log-likelihood out. Weights fit in the cache."""
    return rows * (channels * bytes_per_feature + 4)


def image_flops(pixels: int) -> int:
    """`flow_flops` of all three levels of a square image of `pixels` a side."""
    return sum(flow_flops((pixels // stride) ** 2, channels) for channels, stride in LEVELS)


def image_bytes(pixels: int, bytes_per_feature: int = 4) -> int:
    """`flow_bytes` of all three levels of a square image of `pixels` a side."""
    return sum(flow_bytes((pixels // stride) ** 2, channels, bytes_per_feature) for channels, stride in LEVELS)
