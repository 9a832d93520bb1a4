"""Detection of changes of tensors, without reading their values."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

TensorState = tuple[tuple[int, int], ...]


def tensor_state(tensors: Iterable[Tensor]) -> TensorState:
    """Return each tensor's address and how often PyTorch has changed it.

    Equal states mean equal values, unless something wrote without being counted (`parameter.data`, a CUDA graph).
    Tensors made in inference mode have no count of changes.
    """
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
