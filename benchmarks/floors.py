"""Operations of FrEIA, of training and of the backbone, and the least time a chip needs: what times are held against.

`roofline` counts the flow's inference. Everything counts matrix products and convolutions only, 2 operations per
multiply-add.
"""

from __future__ import annotations

from typing import NamedTuple

from roofline import image_flops

COUPLING_LAYERS, CONDITION_CHANNELS = 8, 128
# tf_efficientnet_b6 up to the last level used (stride 16): channels of the stem, then of each stage its blocks' kernel,
# stride, expansion and channels, and how many there are.
STEM_CHANNELS = 56
STAGES = ((3, 1, 1, 32, 3), (3, 2, 6, 40, 6), (5, 2, 6, 72, 6), (3, 2, 6, 144, 8), (5, 1, 6, 200, 8))


class Chip(NamedTuple):
    """Best rates of a chip, from its data sheet or from a measurement."""

    name: str
    flops_per_second: float  # of dense float16 matrix products
    bytes_per_second: float  # to and from its memory


# From NVIDIA's data sheets, without sparsity: H200 SXM, H100 SXM, A100 80 GB, L4.
CHIPS = (
    Chip("H200", 989e12, 4.8e12),
    Chip("H100 SXM", 989e12, 3.35e12),
    Chip("A100 80 GB", 312e12, 2.0e12),
    Chip("L4", 121e12, 300e9),
)


def floor_seconds(flops: float, bytes_: float, chip: Chip) -> float:
    """Return a lower bound of the seconds for so much work; at best, arithmetic and traffic overlap."""
    return max(flops / chip.flops_per_second, bytes_ / chip.bytes_per_second)


def limited_by_memory(flops: float, bytes_: float, chip: Chip) -> bool:
    """Return True if the traffic takes longer than the arithmetic."""
    return bytes_ / chip.bytes_per_second > flops / chip.flops_per_second


class Subnet(NamedTuple):
    """Multiply-adds of one coupling layer for one row."""

    features: int  # W1's columns over x1, [H, C1]
    condition: int  # W1's columns over the condition, [H, P]; only a dense product has these
    second: int  # W2, [2 C2, H]
    permutation: int  # W_perm, [C, C]

    @staticmethod
    def of(channels: int, condition_channels: int = CONDITION_CHANNELS) -> Subnet:
        c2 = channels // 2
        c1 = channels - c2
        hidden = 2 * (c1 + condition_channels)
        return Subnet(hidden * c1, hidden * condition_channels, 2 * c2 * hidden, channels * channels)


def freia_flops(
    rows: int, channels: int, coupling_layers: int = COUPLING_LAYERS, condition_channels: int = CONDITION_CHANNELS
) -> int:
    """Operations of the flow's inference as FrEIA does it.

    W1 is multiplied with all C1 + P columns of [x1; p], and the last permutation is carried out, although a
    log-likelihood does not depend on it.
    """
    layer = Subnet.of(channels, condition_channels)
    return 2 * rows * coupling_layers * (layer.features + layer.condition + layer.second + layer.permutation)


def training_flops(
    rows: int, channels: int, coupling_layers: int = COUPLING_LAYERS, condition_channels: int = CONDITION_CHANNELS
) -> int:
    """Operations of forward and backward with a separable condition and every activation kept.

    Backward repeats W2's product twice (its weights' gradient and its input's) and likewise W1's; the features need no
    gradient, so the first layer has no gradient of its input. W_perm is fixed. The condition's share of W1 gets its
    gradient from sums over rows and columns of the map, which are no products.
    """
    layer = Subnet.of(channels, condition_channels)
    forward = coupling_layers * (layer.features + layer.second) + (coupling_layers - 1) * layer.permutation
    backward = coupling_layers * (2 * layer.second + layer.features)
    backward += (coupling_layers - 1) * (layer.features + layer.permutation)
    return 2 * rows * (forward + backward)


def freia_training_flops(
    rows: int, channels: int, coupling_layers: int = COUPLING_LAYERS, condition_channels: int = CONDITION_CHANNELS
) -> int:
    """Operations of forward and backward as FrEIA does them.

    As in `training_flops`, but over all C1 + P columns of [x1; p]: PyTorch computes the gradient of the whole input of
    W1, condition included, except in the first layer, where neither part needs one.
    """
    layer = Subnet.of(channels, condition_channels)
    first = layer.features + layer.condition
    forward = coupling_layers * (first + layer.second + layer.permutation)
    backward = coupling_layers * (2 * layer.second + first + layer.permutation) + (coupling_layers - 1) * first
    return 2 * rows * (forward + backward)


def backbone_flops(pixels: int) -> int:
    """Operations of tf_efficientnet_b6's convolutions up to stride 16, for a square image of `pixels` a side."""
    side = _halved(pixels)
    total = 3 * 3 * 3 * STEM_CHANNELS * side**2
    channels = STEM_CHANNELS
    for kernel, stride, expansion, out, blocks in STAGES:
        for block in range(blocks):
            inner, squeezed = expansion * channels, channels // 4
            if expansion > 1:
                total += channels * inner * side**2
            if stride == 2 and block == 0:
                side = _halved(side)
            total += kernel**2 * inner * side**2  # a depthwise convolution
            total += 2 * inner * squeezed  # squeeze and excitation, on means over the image
            total += inner * out * side**2
            channels = out
    return 2 * total


def backbone_share(pixels: int) -> float:
    """The backbone's part of the operations of backbone and flow, between 0 and 1."""
    backbone = backbone_flops(pixels)
    return backbone / (backbone + image_flops(pixels))


def _halved(side: int) -> int:
    """The side after a convolution of stride 2 with TensorFlow's padding."""
    return -(-side // 2)
