"""Registration of custom operators, which torch.compile and torch.export see as one node each.

Every operator has a launch of its kernels, whose signature is its schema, and a fake implementation for tracing. A
graph that was traced for a GPU may also run on CPU tensors: by Triton's interpreter where that is switched on, else by
the operator's portable implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from .dispatch import interpreting


def register(
    name: str,
    launch: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    portable: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Return the operator `fastbgad::<name>`, registered for CUDA and CPU tensors.

    Args:
        name: of the operator, without its namespace.
        launch: runs the kernels. The schema is inferred from its signature.
        fake: returns empty results of the right shapes, types and strides.
        portable: computes the same on CPU tensors without kernels; without it the operator then raises `BackendError`.
        setup_context, backward: the gradient, as `torch.library.register_autograd` takes it; without `backward` the
            operator has none.
    """

    def on_cpu(*arguments: Any) -> Any:
        if interpreting():
            return launch(*arguments)
        if portable is None:
            raise BackendError(f"fastbgad::{name} runs on CUDA tensors; trace the model with impl='torch' for a CPU")
        return portable(*arguments)

    operator = torch.library.custom_op(f"fastbgad::{name}", launch, mutates_args=(), device_types="cuda")
    operator.register_kernel("cpu")(on_cpu)
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=setup_context)
    return operator


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an uninitialized tensor on the device of another one."""
    return torch.empty(shape, dtype=dtype, device=like.device)
