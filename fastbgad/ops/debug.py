"""Optional value checks. They synchronize with the device, so they are off by default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import FeatureError
from ..flow_spec import CouplingWeights
from .positional import PositionalRows

_depth = 0  # of nested `debug_checks`


@contextmanager
def debug_checks() -> Iterator[None]:
    """Make the flow check values of its arguments, and not only their shapes, inside a `with` block.

    Features must be finite, indices in range and W_perm orthogonal; the first violation raises `FeatureError`, which
    says where. Without these checks such values give NaN in their own rows (a W_perm that is not orthogonal: wrong
    log-likelihoods). Every check synchronizes with the device: use it to find a mistake, not in production. It applies
    to the whole process; a compiled model keeps the setting that it was traced with.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def debugging() -> bool:
    """Return whether checks of values are on."""
    return _depth > 0


def check_values(
    x: Tensor,
    layers: Sequence[CouplingWeights],
    condition: PositionalRows | Tensor | None,
    rows: Tensor | None,
) -> None:
    """Raise `FeatureError` for features, a condition, indices or rotations that cannot be used."""
    _require_finite("features", x)
    if isinstance(condition, Tensor):
        _require_finite("the condition", condition)
    elif condition is not None and condition.index is not None:
        _require_range("positions", condition.index, condition.height * condition.width)
    if rows is not None:
        _require_range("rows", rows, len(x))
    for number, layer in enumerate(layers):
        w = layer.w_perm.detach().double()
        error = float((w @ w.T - torch.eye(len(w), dtype=w.dtype, device=w.device)).abs().max())
        if not error < 1e-4:
            raise FeatureError(
                f"W_perm of coupling layer {number} is not orthogonal (W W^T is off by {error:.1e}): its "
                "log-determinant would be missing from every log-likelihood"
            )


def _require_finite(what: str, values: Tensor) -> None:
    bad = ~torch.isfinite(values).all(dim=1)
    if bool(bad.any()):
        raise FeatureError(
            f"{what} hold NaN or Inf in {int(bad.sum())} of {len(bad)} rows, first in row {int(bad.int().argmax())}"
        )


def _require_range(what: str, index: Tensor, end: int) -> None:
    bad = (index < 0) | (index >= end)
    if bool(bad.any()):
        first = int(bad.int().argmax())
        raise FeatureError(
            f"{int(bad.sum())} {what} are outside [0, {end}), first number {first}, which is {int(index[first])}"
        )
