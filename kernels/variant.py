"""What each kernel module says about itself to `fastbgad.kernels.resources` and `fastbgad.kernels.tune`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Every kernel module; each has `variants()`, and `tuning_cases()` where tile sizes are a choice.
MODULES = ("log_likelihood", "boundary", "spp_loss", "score_map", "flow.variants", "coupling.variants")


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
    """One entry of the tile sizes, and how to find out which are best for it.

    Attributes:
        kernel, key: what `tiles(kernel, key, device)` is asked for.
        candidates: tile sizes to try; the default of this entry is always tried as well.
        prepare: makes a problem on a device and returns `run(tiles) -> outputs`, which solves it with given tile sizes
            without waiting for the device.
        tolerance: by how much an output may differ from that of the default tiles, relative to its largest magnitude.
    """

    kernel: str
    key: str
    candidates: Sequence[Mapping[str, int]]
    prepare: Callable[[torch.device], Callable[[Mapping[str, int]], Sequence[Tensor]]]
    tolerance: float = 1e-4


def reason(error: BaseException) -> str:
    """One line on why a kernel could not be compiled or launched: the end of its innermost cause's message."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Repro command")]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
