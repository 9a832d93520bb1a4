"""The machine and the versions that a result was made with."""

from __future__ import annotations

import functools
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from ..errors import ConfigError

_PACKAGES = ("fastbgad", "torch", "torchvision", "timm", "numpy", "scipy", "safetensors", "triton")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on; "absent" for one that is not installed."""
    known = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            known[package] = "absent"
    return known


def machine() -> dict[str, str]:
    """Return the processor, threads and accelerator of this machine."""
    gpu = "none"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "gpu": gpu,
    }


def choose_device(name: str) -> torch.device:
    """Return the device of a name, for "auto" the first GPU or else the CPU.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; give auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device {name!r} is not on this machine; use auto or cpu")
    return device


@functools.cache
def cpu_facts() -> dict[str, str]:
    """Return the entries of /proc/cpuinfo about the first processor; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _processor() -> str:
    return cpu_facts().get("model name") or platform.processor() or platform.machine()
