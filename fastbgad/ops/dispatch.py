"""Which implementation of an operation runs, and checks that every door shares.

`impl` is "auto", "torch" (the portable fast path), "reference" (the oracle) or "triton". An explicit choice never
falls back silently: it runs or it raises `BackendError`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import BackendError, ConfigError, FeatureError

Impl = Literal["auto", "torch", "reference", "triton"]


def resolve_impl(impl: Impl) -> Literal["torch", "reference"]:
    """The implementation that will run; raises `ConfigError` for an unknown name, `BackendError` for one not here."""
    if impl == "auto":
        return "torch"
    if impl == "triton":
        raise BackendError('impl="triton": this release has no Triton kernels yet; use impl="torch" or "auto"')
    if impl not in get_args(Impl):
        raise ConfigError(f"impl is {impl!r}; choose one of {', '.join(get_args(Impl))}")
    return impl


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type the arithmetic runs in: float64 for float64 input, float32 for anything narrower."""
    if not x.is_floating_point():
        raise FeatureError(f"features must be floating point, not {x.dtype}")
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_mask(lp: Tensor, anomalous: Tensor) -> None:
    """Raises `FeatureError` unless `anomalous` is a bool tensor of lp's one-dimensional shape."""
    if lp.dim() != 1 or anomalous.shape != lp.shape:
        raise FeatureError(
            f"log-likelihoods and mask must both be [N], not {tuple(lp.shape)} and {tuple(anomalous.shape)}"
        )
    if anomalous.dtype != torch.bool:
        raise FeatureError(f"the mask must be bool (True: anomalous), not {anomalous.dtype}")
