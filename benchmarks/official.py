"""The official BGAD code as a contender: a few functions out of a checkout that its user already has.

Nothing of it is part of this package: it has no licence. `pytest benchmarks --official PATH` names the checkout
(https://github.com/xcyao00/BGAD).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from harness import SkippedError

OFFICIAL = "official BGAD"


class OfficialCode(NamedTuple):
    """Functions of the official code, under the names that this package has for the same things."""

    log_likelihood: Callable[..., Any]  # (channels, z [N, C], log_det [N]) -> [N], not divided by the channels
    boundary: Callable[..., Any]  # (lp [N], mask [N], beta, tau, normalizer) -> (b_n, b_a)
    spp_loss: Callable[..., Any]  # (lp [N], mask [N], boundaries, normalizer, weights=[N]) -> (L_n, L_a)
    normal_weights: Callable[..., Any]  # (lp of normal rows) -> focal weights
    anomalous_weights: Callable[..., Any]  # (lp of anomalous rows) -> focal weights
    pro: Callable[..., float]  # (maps [N, H, W], masks bool [N, H, W]) -> PRO of 1000 thresholds, up to an FPR of 0.3


@cache
def load(path: str) -> OfficialCode:
    """Import two files of the checkout at `path`, each by itself, since its packages import much more than is needed.

    Raises:
        SkippedError: a file, a package it imports or a function is missing; or NumPy is 1.24 to 1.26.
    """
    losses = _import(Path(path) / "losses" / "losses.py")
    utilities = _import(Path(path) / "utils" / "utils.py")
    if not hasattr(np, "bool"):
        raise SkippedError(f"the official code says numpy.bool, which numpy {np.__version__} lacks; numpy 2 has it")
    return OfficialCode(
        log_likelihood=_function(utilities, "get_logp"),
        boundary=_function(losses, "get_logp_boundary"),
        spp_loss=_function(losses, "calculate_bg_spp_loss"),
        normal_weights=_function(losses, "normal_fl_weighting"),
        anomalous_weights=_function(losses, "abnormal_fl_weighting"),
        pro=_function(utilities, "calculate_pro_metric"),
    )


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise SkippedError(f"no file {path}; --official takes a checkout of the official BGAD code")
    spec = importlib.util.spec_from_file_location(f"official_bgad_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise SkippedError(f"{path} needs {error.name or error}, which cannot be imported here") from error
    except Exception as error:  # whatever a checkout of another state does, the other contenders run
        raise SkippedError(f"{path} cannot be imported: {error}") from error
    return module


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    if not callable(found := getattr(module, name, None)):
        raise SkippedError(f"{module.__file__} has no function {name}; use a newer checkout of the official code")
    return found
