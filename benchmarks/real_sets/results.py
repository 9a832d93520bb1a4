"""Result files: one per run, and a small one of all figures that is committed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastbgad.errors import FastBGADError
from fastbgad.system.files import write_json, write_text

from .grid import METHODS, Run

METRICS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "recall_at_1_percent": "recall at 1 % false alarms",
}


class DamagedResultError(FastBGADError):
    """A result file holds something else; the message names it and says what to do."""


@dataclass(frozen=True)
class Result:
    """Figures of a run."""

    run: Run
    metrics: dict[str, float]
    """Named as in `METRICS`, each in [0, 1]."""
    decision: dict[str, float] | None
    """Shares of test images beyond b_n and b_a; None for methods without boundaries."""
    training_seconds: float
    scoring_seconds: float
    images: dict[str, int]
    """Numbers of images: normals, known, known_used, test_normal, test_anomalous."""
    points: list[dict[str, float]] = field(default_factory=list)
    """Of a convergence run: passes, seconds and metrics after every meta epoch."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever a reader may ask for later: recipe, versions, machine."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Result:
        """Return the result that `as_dict` described; raises TypeError, KeyError or ValueError for anything else."""
        values = dict(content)
        result = cls(**{**values, "run": Run(**values["run"])})
        if result.run.method not in METHODS or set(result.metrics) != set(METRICS):
            raise ValueError(f"its method is {result.run.method!r} and its metrics are {sorted(result.metrics)}")
        shares = [*result.metrics.values(), *(result.decision or {}).values()]
        if not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares):
            raise ValueError("a metric is no number between 0 and 1")
        seconds = (result.training_seconds, result.scoring_seconds)
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in seconds):
            raise ValueError("its seconds are no numbers")
        return result


def result_path(out: Path, run: Run) -> Path:
    """Return where a run's result lies."""
    return out / run.path


def write_result(out: Path, result: Result) -> None:
    """Write a result whole or not at all; raises `OutputError`."""
    write_json(result_path(out, result.run), result.as_dict())


def read_result(path: Path) -> Result:
    """Read a result file; raises `DamagedResultError`."""
    try:
        return Result.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedResultError(
            f"{path} is no result of this command ({type(error).__name__}: {' '.join(str(error).split())}); run the "
            "command again with its category to redo it, or delete it"
        ) from error


def is_done(out: Path, run: Run) -> bool:
    """Return whether a run has a result; raises `DamagedResultError` where there is a file but no such result in it."""
    path = result_path(out, run)
    if not path.exists():
        return False
    found = read_result(path)
    if found.run != run:
        raise DamagedResultError(f"{path} holds the result of another run ({found.run.title}); delete it")
    return True


def collect(out: Path) -> tuple[list[Result], list[str]]:
    """Return all results below a folder, and a line for every file that cannot be used."""
    results, problems = [], []
    for path in sorted(out.glob("*/*/*-seed*.json")):
        try:
            results.append(read_result(path))
        except DamagedResultError as error:
            problems.append(str(error))
    return results, problems


def write_collection(path: Path, results: Iterable[Result]) -> None:
    """Write all figures as one JSON file with a line per run; what is the same in all of them stands once."""
    rows = [_row(result) for result in sorted(results, key=lambda result: str(result.run.path))]
    common = {key: rows[0]["facts"][key] for key in _common_keys(rows)} if rows else {}
    for row in rows:
        row["facts"] = {key: value for key, value in row["facts"].items() if key not in common}
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    write_text(path, f'{{"common": {json.dumps(common, allow_nan=False)},\n"results": [\n{lines}\n]}}\n')


def read_collection(path: Path) -> list[Result]:
    """Read what `write_collection` wrote; raises `DamagedResultError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        common = content["common"]
        return [Result.from_dict({**row, "facts": {**common, **row["facts"]}}) for row in content["results"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedResultError(
            f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split())}); restore it from git, or "
            "collect the results again with --page"
        ) from error


def _row(result: Result) -> dict[str, Any]:
    row = result.as_dict()
    row["metrics"] = {name: round(value, 5) for name, value in result.metrics.items()}
    if result.decision is not None:
        row["decision"] = {name: round(value, 4) for name, value in result.decision.items()}
    row["training_seconds"], row["scoring_seconds"] = (
        round(result.training_seconds, 1),
        round(result.scoring_seconds, 1),
    )
    return row


def _common_keys(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]["facts"]
    return [key for key in first if all(key in row["facts"] and row["facts"][key] == first[key] for row in rows)]
