"""Builds the features that contenders share: which backbone a short name means, and where its weights come from."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import NamedTuple

from fastbgad.backbones import Backbone, create_backbone
from fastbgad.errors import BackboneError

SHORT_NAMES = {f"lite{number}": f"tf_efficientnet_lite{number}" for number in range(5)}
RAW = "-raw"


class Features(NamedTuple):
    """Features by the name that the command line and the results give them."""

    name: str  # such as gabor, lite0, lite0-raw
    backbone: str  # gabor or timm's name
    standardize: str  # "channel" or "none"


def features_named(name: str) -> Features:
    """Return what a name means: gabor, a short name or one of timm's; with `-raw` channels are left as they are."""
    base = name.removesuffix(RAW)
    return Features(name, SHORT_NAMES.get(base, base), "none" if name.endswith(RAW) or base == "gabor" else "channel")


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
    # The one place where standardization is asked for; a fastbgad without it gives raw features, as the record says.
    known = "standardize" in inspect.signature(create_backbone).parameters
    options = {"standardize": features.standardize} if known else {}
    if weights == "package" and find_spec("fastbgad.backbones.packaged") is None:
        raise BackboneError(
            "this fastbgad reads no weights from Python packages; give --weights FILE, or --weights random to try the "
            "command out"
        )
    source = weights.replace("{features}", features.name.removesuffix(RAW))
    backbone = create_backbone(features.backbone, weights=source, **options)
    origin = weights if weights in ("package", "random", "pretrained") else "file"
    used = features.standardize if known else "none"
    return backbone, {"backbone": features.backbone, "weights": origin, "standardize": used}
