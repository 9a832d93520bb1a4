"""Files of `torch.save` by other programs, read without running code from them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, FastBGADError
from ..wording import first_line


class InertObject:
    """An object of a class that PyTorch does not load: takes any arguments and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> InertObject:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_torch_file(
    path: Path,
    remedy: str,
    *,
    error: type[FastBGADError] = CheckpointError,
    inert_objects: bool = False,
) -> Any:
    """Read a file of `torch.save`, its tensors on the CPU, by PyTorch's restricted unpickler.

    Args:
        path: of the file.
        remedy: what the user can do about a file that cannot be read; it ends the message.
        error: class of the error that is raised.
        inert_objects: replace objects of classes that PyTorch does not load by `InertObject`; otherwise they are an
            error.

    Raises:
        FastBGADError: of class `error`: the file is damaged, of another format, or holds objects that are not loaded.
    """
    try:
        return _load_inert(path) if inert_objects else _load(path)
    except Exception as problem:
        # Damage and refusals come as many kinds of errors. The unpickler's own message advises to load unsafely.
        detail = "" if isinstance(problem, pickle.UnpicklingError) else f" ({first_line(problem)})"
        raise error(
            f"{path} cannot be read{detail}: it is damaged, not written by torch.save, or holds Python objects besides "
            f"tensors, which are not loaded for safety; {remedy}"
        ) from problem


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_inert(path: Path) -> Any:
    try:
        return _load(path)
    except pickle.UnpicklingError:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if not unknown:
            raise
    with torch.serialization.safe_globals([(InertObject, name) for name in unknown]):
        return _load(path)
