"""Telling whether tensors have changed since something was made of them, without looking at their values."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

TensorState = tuple[tuple[int, int], ...]


def tensor_state(tensors: Iterable[Tensor]) -> TensorState:
    """Return the address of each tensor's memory and the number of changes that PyTorch has counted.

    Equal states mean equal values unless something wrote behind PyTorch's back (`parameter.data`, a CUDA graph).
    Tensors made in inference mode have no count of changes.
    """
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
