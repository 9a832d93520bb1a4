"""Choices that several commands share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, cast, get_args

from ..backbones import Standardize
from ..data.inspection import Check as Check
from ..data.layouts import FileOptions as FileOptions
from ..data.layouts import Layout as Layout
from ..errors import Notice

Preset = Literal["official", "short", "demo"]
STANDARDIZE: dict[Preset, Standardize] = {"official": "none", "short": "whiten", "demo": "whiten"}
"""What each preset does to features: the official code leaves them as they are; few passes need them on one scale."""
Dtype = Literal["float32", "bfloat16", "float16"]

# former name of an option -> its name
RENAMED = {"--precision": "--matmul-precision"}


def renamed_options(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with former names of options replaced, and warn of each."""
    replaced = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in RENAMED:
            warnings.warn(f"{name} is deprecated; it is now called {RENAMED[name]}", Notice, stacklevel=2)
            name = RENAMED[name]
        replaced.append(name + equals + value)
    return replaced


def preset_of(arguments: Sequence[str]) -> Preset:
    """Return the value of --preset, which is needed before parsing: it decides the defaults that --help shows."""
    for number, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--preset":
            value = value or (arguments[number + 1] if number + 1 < len(arguments) else "")
            if value in get_args(Preset):
                return cast(Preset, value)
    return "official"
