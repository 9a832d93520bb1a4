"""Safetensors files under any name: the library opens only those whose path is UTF-8."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from ..wording import printable

_LENGTH_BYTES = 8  # of the length of the header, at the start of a file


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, on the CPU, and the metadata of its header.

    Raises:
        SafetensorError, OSError, ValueError: the file is missing, damaged or of another format.
    """
    if printable(str(path)) == str(path):
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    content = path.read_bytes()
    tensors = load(content)
    # The library has checked the header, but gives its metadata for paths only.
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])
    return tensors, header.get("__metadata__", {})
