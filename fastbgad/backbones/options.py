"""Options of a backbone, and the checks that need neither timm nor the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BackboneError, check_choice
from .standardization import Standardize

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class BackboneOptions:
    """Arguments of `create_backbone`, which describes them."""

    name: str = "tf_efficientnet_b6"
    levels: Sequence[int] = (1, 2, 3)
    weights: str | Path = "pretrained"
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    padding_mode: str = "zeros"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    standardize: Standardize = "whiten"
    neighborhood: int | None = None

    @property
    def patches_a_side(self) -> int:
        """Patches a side that features are averaged over: `neighborhood` or its default."""
        if self.neighborhood is None:
            return 1 if self.standardize == "none" else 3
        return self.neighborhood


def check_gabor_options(options: BackboneOptions) -> None:
    """Raise `BackboneError` for options that the Gabor filter bank does not have."""
    if str(options.weights) != "pretrained":
        raise BackboneError(f"the gabor backbone has no weights to load from {options.weights}: leave weights out")
    if options.dtype != "float32" or options.compile:
        raise BackboneError("the gabor backbone runs in float32, uncompiled: leave dtype and compile out")
    if options.standardize != "whiten" or options.neighborhood is not None:
        raise BackboneError(
            "the gabor backbone has a standardization of its own: leave standardize and neighborhood out"
        )
    if options.padding_mode != "zeros" or options.mean is not None or options.std is not None:
        raise BackboneError("the gabor backbone knows no other padding, mean or std: leave them out")


def check_timm_options(options: BackboneOptions) -> None:
    """Raise `BackboneError` for options that no timm model can have."""
    check_choice("padding_mode", options.padding_mode, ("zeros", "reflect"), BackboneError)
    check_choice("standardize", options.standardize, Standardize, BackboneError)
    if options.patches_a_side < 1 or options.patches_a_side % 2 == 0:
        raise BackboneError(
            f"neighborhood is {options.neighborhood}; give an odd number of patches a side, such as 3, or 1"
        )
    check_choice("dtype", options.dtype, DTYPES, BackboneError)
