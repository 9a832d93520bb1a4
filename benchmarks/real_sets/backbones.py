"""Builds the features that contenders share: which backbone a short name means, and where its weights come from."""

from __future__ import annotations

from typing import NamedTuple

from fastbgad.backbones import Backbone, Standardize, create_backbone

SHORT_NAMES = {f"lite{number}": f"tf_efficientnet_lite{number}" for number in range(5)}
ENDINGS: dict[str, tuple[Standardize, int | None]] = {
    "-raw": ("none", None),
    "-channel": ("channel", None),
    "-sharp": ("whiten", 1),
}
"""What is done to features by the ending of their name: how they are standardized, and over how many neighbors coarse
levels are averaged."""


class Features(NamedTuple):
    """Features by the name that the command line and the results give them."""

    name: str  # such as gabor, lite0, lite0-raw
    short: str  # without the ending
    backbone: str  # gabor or timm's name
    standardize: Standardize
    neighborhood: int | None = None


def features_named(name: str) -> Features:
    """Return what a name means: gabor, a short name or one of timm's; an ending says how features are standardized."""
    for ending, (kind, neighborhood) in ENDINGS.items():
        if name.endswith(ending):
            short = name.removesuffix(ending)
            return Features(name, short, SHORT_NAMES.get(short, short), kind, neighborhood)
    return Features(name, name, SHORT_NAMES.get(name, name), "whiten")


def build(features: Features, weights: str) -> tuple[Backbone, dict[str, str]]:
    """Return the backbone and what is to be recorded of it.

    Args:
        features: see `features_named`.
        weights: "package" (those that a Python package brings), "random", "pretrained" (from the hub) or a file, in
            whose name {features} stands for the short name.

    Raises:
        BackboneError, CheckpointError, MissingDependencyError: the backbone or its weights cannot be had.
    """
    if features.backbone == "gabor":
        return create_backbone("gabor"), {"backbone": "gabor", "weights": "none", "standardize": "by the filter bank"}
    source = weights.replace("{features}", features.short)
    backbone = create_backbone(
        features.backbone, weights=source, standardize=features.standardize, neighborhood=features.neighborhood
    )
    origin = weights if weights in ("package", "random", "pretrained") else "file"
    return backbone, {"backbone": features.backbone, "weights": origin, "standardize": features.standardize}
