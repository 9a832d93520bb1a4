"""`fastbgad info`: versions, machine, and what a model file holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..evaluate.unseen import KNOWN_FILES, KNOWN_NAMES
from ..model.detector import BGAD
from ..render import console
from ..system.environment import machine, versions
from .results import method_of


@dataclass(frozen=True)
class Info:
    """Show versions, machine and, if one is given, what a model file holds."""

    model: Path | None = None
    """A model.safetensors that train wrote."""

    def run(self) -> int:
        """Print the facts; return the exit code."""
        console.print_facts({**versions(), **machine()})
        if self.model is not None:
            print()
            print_model(self.model)
        return 0


def print_model(path: Path) -> None:
    """Print how a model was trained, how it decides, and its architecture as JSON."""
    model = BGAD.load(path)
    thresholds = ", ".join(f"{edge:.4f}" for edge in model.thresholds()) if model.calibrated else "no calibration"
    facts: dict[str, object] = {
        "model": path,
        "method": method_of(model),
        "parameters of the flows": f"{sum(p.numel() for p in model.flows.parameters() if p.requires_grad):,}",
        "score at b_n, b_a": thresholds,
        "passes trained": len(model.history.get("passes", [])),
        "known anomalies": _known_anomalies(model),
    }
    console.print_facts(facts)
    print(json.dumps(model.architecture(), indent=2))


def _known_anomalies(model: BGAD) -> str:
    """Return the number of known anomalies, and how `evaluate` recognizes them."""
    number = len(model.history.get(KNOWN_NAMES, []))
    if not number:
        return "0"
    return f"{number}, recognized by {'content' if KNOWN_FILES in model.history else 'name alone (an older file)'}"
