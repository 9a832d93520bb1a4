"""Replacement of a module's `forward` by changing its class to a subclass, and back.

The object, its tensors and all references to it stay the same, which a wrapper around it could not offer.
"""

from __future__ import annotations

import torch
from torch import nn

_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def swapped_class(mixin: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `original` with `mixin` before it; the same subclass for the same two classes."""
    key = mixin, original
    if key not in _classes:
        _classes[key] = type(f"Accelerated{original.__name__}", key, {"__module__": mixin.__module__})
    return _classes[key]


def swap(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Put a mixin before a module's class, in place."""
    module.__class__ = swapped_class(mixin, type(module))


def swap_back(module: nn.Module) -> None:
    """Undo `swap`, in place."""
    module.__class__ = original_class(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before `swap`."""
    _, original = type(module).__bases__
    return original


def rebuild(mixin: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    """Return an empty object of the swapped class, for unpickling and copying: such a class has no importable name."""
    return object.__new__(swapped_class(mixin, original))


def exporting() -> bool:
    """Return True while a graph is traced or exported to run elsewhere."""
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling())
