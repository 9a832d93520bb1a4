"""Giving an existing module another `forward` by changing its class to a subclass of its own, and back.

The object, its tensors and whatever refers to it stay as they are, which a wrapper around it could not offer.
"""

from __future__ import annotations

import torch
from torch import nn

_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def swapped_class(mixin: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `original` in which `mixin` goes first; the same one for the same classes."""
    key = mixin, original
    if key not in _classes:
        _classes[key] = type(f"Accelerated{original.__name__}", key, {"__module__": mixin.__module__})
    return _classes[key]


def swap(module: nn.Module, mixin: type[nn.Module]) -> None:
    module.__class__ = swapped_class(mixin, type(module))


def swap_back(module: nn.Module) -> None:
    module.__class__ = original_class(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    _, original = type(module).__bases__
    return original


def rebuild(mixin: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    """An empty object of the swapped class: such a class has no name to pickle it by, so it is made where it goes."""
    return object.__new__(swapped_class(mixin, original))


def exporting() -> bool:
    """Whether a graph is being made to run elsewhere."""
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling())
