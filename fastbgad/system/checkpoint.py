"""Checkpoints: one safetensors file whose header holds JSON metadata and a checksum over both.

One file, written atomically, so weights and metadata can never come from two different moments; no pickle, so
loading a checkpoint never runs code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError
from .files import write_bytes
from .tensor_file import read_safetensors

FORMAT = 1
HEADER = "fastbgad"


def save_checkpoint(path: str | Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata atomically.

    Args:
        path: usually `*.safetensors`.
        kind: of the checkpoint ("model", "training"); loading compares it.
        tensors: by name; moved to the CPU.
        metadata: anything JSON can hold.

    Raises:
        OutputError: the file cannot be written; whatever was there before is kept.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, "kind": kind, **metadata}, sort_keys=True, allow_nan=False)
    # One entry: safetensors writes several in random order, and the same run should give the same bytes.
    header = json.dumps({"sha256": checksum(on_cpu, text), "metadata": text})
    write_bytes(path, save(on_cpu, {HEADER: header}))


def load_checkpoint(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_checkpoint`: its tensors, on the CPU, and its metadata.

    Raises:
        CheckpointError: no such file, not a fastbgad checkpoint, another kind or a newer format, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give the path of a file that `fastbgad train` wrote")
    try:
        tensors, header = read_safetensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); copy it again from its source or train again"
        ) from error
    if HEADER not in header:
        raise CheckpointError(f"{path} was not written by fastbgad: its header lacks the metadata")
    try:
        entry = json.loads(header[HEADER])
        whole = entry["sha256"] == checksum(tensors, entry["metadata"])
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{path} is damaged: its content does not match its checksum; copy it again from its source or train again"
        )
    metadata = json.loads(entry["metadata"])
    if metadata["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {metadata['format']}, this fastbgad reads up to {FORMAT}; upgrade fastbgad"
        )
    if metadata["kind"] != kind:
        raise CheckpointError(f"{path} is a {metadata['kind']} checkpoint, but a {kind} checkpoint is needed here")
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the SHA-256 over the metadata and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Byte views need at least one dimension; numpy has no bfloat16.
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
