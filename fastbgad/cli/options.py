"""Choices that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, get_args

from ..backbones import Standardize

Preset = Literal["official", "short", "demo"]
STANDARDIZE: dict[Preset, Standardize] = {"official": "none", "short": "whiten", "demo": "whiten"}
"""What each preset does to features: the official code leaves them as they are; few passes need them on one scale."""
Check = Literal["full", "quick", "none"]
Layout = Literal["auto", "mvtec", "btad", "folder"]
Dtype = Literal["float32", "bfloat16", "float16"]


def preset_of(arguments: Sequence[str]) -> Preset:
    """The value of --preset, needed before parsing: it decides the defaults that --help shows."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--preset":
            value = value or (arguments[place + 1] if place + 1 < len(arguments) else "")
            if value in get_args(Preset):
                return cast(Preset, value)
    return "official"
