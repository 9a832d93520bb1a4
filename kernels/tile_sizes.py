"""Tile sizes that the kernels are launched with.

    tiles("score_map", "map", device)  ->  {"TH": 8, "TW": 64, "num_warps": 4}

`configs/default.json` holds tiles that compile everywhere, for every kernel and key:

    {"score_map": {"map": {"TH": 8, ...}}, ...}

`configs/<gpu>.json`, written by `python -m fastbgad.kernels.tune`, holds those measured on one GPU: under "tiles" the
same form as the default, under "microseconds" the measured times, under "measured_on" where and when. Entries that such
a file lacks are taken from the default.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = CONFIGS / "default.json"
TUNING_COMMAND = "python -m fastbgad.kernels.tune"

# kernel -> key -> name of the tile size -> value
Table = Mapping[str, Mapping[str, Mapping[str, int]]]


class TilesError(ValueError):
    """A file of tile sizes cannot be used; the message names it."""


class UntunedGPUWarning(UserWarning):
    """The kernels run with default tile sizes on a GPU they were not tuned for."""


_chosen_file: Path | None = None
_noticed = False


def tiles(kernel: str, key: str, device: torch.device) -> Mapping[str, int]:
    """Return the tile sizes, number of warps and pipeline stages of a kernel on a device.

    Args:
        kernel: name of the kernel, e.g. "flow_forward".
        key: the entry of the kernel, e.g. "C64 float16", see `configs/default.json`.
        device: where the tensors are. CPU tensors (the interpreter) get the default.

    Raises:
        TilesError: a malformed file, or a kernel and key that even the default lacks.

    Without a file for this GPU the default is used and `UntunedGPUWarning` is issued, once per process.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _tiles(kernel, key, device)


def use_tiles(path: str | Path | None) -> None:
    """Take the tile sizes from this file from now on, on every device; None restores the packaged files.

    Raises:
        TilesError: the file is missing or malformed; the earlier choice stays.
    """
    global _chosen_file
    if path is not None:
        read_tuned(Path(path))
    _chosen_file = None if path is None else Path(path)
    forget()


def forget() -> None:
    """Read the files again at the next launch, after one has been written."""
    _tiles.cache_clear()
    _device_table.cache_clear()


def slug(gpu_name: str) -> str:
    """Return the name of a GPU's file: "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu_name.lower()).strip("_")


def default_tiles() -> Table:
    """Return the content of `configs/default.json`."""
    return _table(read_json(DEFAULT), DEFAULT)


def read_tuned(path: Path) -> Table:
    """Return the "tiles" of a file that the tuning command wrote, checked against the default.

    Raises:
        TilesError: the file is missing, malformed, or has other names of tile sizes than the kernels take now.
    """
    content = read_json(path)
    if "tiles" not in content:
        raise TilesError(f'{path} has no "tiles"; write it with `{TUNING_COMMAND} --out {path}`')
    tuned, default = _table(content["tiles"], path), default_tiles()
    for kernel, entries in tuned.items():
        for key, sizes in entries.items():
            expected = default.get(kernel, {}).get(key)
            if expected is not None and set(expected) != set(sizes):
                raise TilesError(
                    f"{path}: {kernel} / {key} has {', '.join(sorted(sizes))} where the kernel takes "
                    f"{', '.join(sorted(expected))}; tune again with `{TUNING_COMMAND}`"
                )
    return tuned


def write_json(path: Path, content: Any) -> None:
    """Write `content` as readable JSON, whole or not at all; raise `OSError` where that is not possible."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@functools.lru_cache(maxsize=4096)
def _tiles(kernel: str, key: str, device: torch.device) -> Mapping[str, int]:
    """Return the tuned or the default tile sizes."""
    for table in (_device_table(device), default_tiles()):
        sizes = table.get(kernel, {}).get(key)
        if sizes is not None:
            return MappingProxyType(dict(sizes))
    raise TilesError(f"{DEFAULT} has no entry {kernel} / {key}")


@functools.lru_cache(maxsize=64)
def _device_table(device: torch.device) -> Table:
    """Return the tile sizes tuned for this device; none for a device without a file."""
    global _noticed
    if _chosen_file is not None:
        return read_tuned(_chosen_file)
    if device.type != "cuda":
        return {}
    gpu = torch.cuda.get_device_name(device)
    path = CONFIGS / f"{slug(gpu)}.json"
    if path.is_file():
        return read_tuned(path)
    if not _noticed:
        _noticed = True
        warnings.warn(
            f"no tile sizes have been tuned for {gpu}; the defaults are used. `{TUNING_COMMAND}` measures better ones",
            UntunedGPUWarning,
            stacklevel=2,
        )
    return {}


def read_json(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file; raise `TilesError` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TilesError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise TilesError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _table(content: Any, path: Path) -> Table:
    """Return `content` if it has the form kernel -> key -> name -> whole number, else raise `TilesError`."""
    for kernel, entries in _items(content, path, "the tiles"):
        for key, sizes in _items(entries, path, kernel):
            for name, value in _items(sizes, path, f"{kernel} / {key}"):
                if type(value) is not int or value < 0:
                    raise TilesError(f"{path}: {kernel} / {key} / {name} is {value!r}, not a whole number")
    return content


def _items(content: Any, path: Path, name: str) -> list[tuple[str, Any]]:
    """Return the items of a JSON object, else raise `TilesError`."""
    if not isinstance(content, dict):
        raise TilesError(f"{path}: {name} must be a JSON object, not {type(content).__name__}")
    return list(content.items())
