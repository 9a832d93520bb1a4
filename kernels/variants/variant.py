"""Descriptions of kernels for `fastbgad.kernels.resources` and `fastbgad.kernels.tune`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Variant(NamedTuple):
    """A kernel in one of the configurations it ships in, described well enough to compile it without a GPU.

    Attributes:
        name: the kernel's name and what is special about this variant, e.g. "flow_forward C=40 raster float16".
        kernel: the function under @triton.jit.
        types: argument name -> Triton type ("*fp32", "i32", "fp32", ...) of every argument that is not a constant; a
            tuple of types for an argument that is a tuple.
        constants: argument name -> value of every `tl.constexpr` argument.
        num_warps, num_stages: how it is launched.
        multiples_of_16: integer arguments compiled as Triton does for values that 16 divides. Pointers always are.
    """

    name: str
    kernel: Any
    types: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    multiples_of_16: Collection[str] = ()


class TuningCase(NamedTuple):
    """One entry of the tile sizes, and how to find the best ones for it.

    Attributes:
        kernel, key: the arguments of `tiles(kernel, key, device)`.
        candidates: tile sizes to try; the default of this entry is always tried as well.
        prepare: makes a problem on a device and returns `run(tiles) -> outputs`, which solves it with given tile sizes
            without waiting for the device.
        tolerance: largest difference of an output from that of the default tiles, relative to its largest magnitude.
    """

    kernel: str
    key: str
    candidates: Sequence[Mapping[str, int]]
    prepare: Callable[[torch.device], Callable[[Mapping[str, int]], Sequence[Tensor]]]
    tolerance: float = 1e-4
