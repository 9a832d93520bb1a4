"""Result files for the performance page, whichever command wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from floors import Chip


class PageError(Exception):
    """A result file cannot be read; the message names it and says what to do."""


@dataclass
class Source:
    """One result file, in the harness's form whichever command wrote it.

    Attributes:
        label: its path below the folder of the page.
        machine: what its figures were measured on.
        results: as `harness.stamped` gives them; those of a GPU have "of_floor" per contender and may be "refused".
        notes: what is to be said about the whole file.
        chip: rates measured on that machine, if the file has them.
    """

    label: str
    machine: str
    results: list[Mapping[str, Any]]
    notes: list[str] = field(default_factory=list)
    chip: Chip | None = None

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.label.removesuffix(".json").partition("/")[2].lower()).strip("-")


def read_sources(folder: Path) -> list[Source]:
    """Every file of `make bench`, then of every GPU the newest file of `make gpu` that is not a dry run."""
    sources = [_from_harness(path, f"{folder.name}/{path.name}") for path in sorted(folder.glob("*.json"))]
    for gpu in sorted(path for path in folder.glob("*") if path.is_dir()):
        for path in sorted(gpu.glob("*.json"), reverse=True):  # their names begin with the date
            content = _read(path)
            if not isinstance(content, dict):
                raise _damaged(path, "it holds no run of `make gpu`")
            if content.get("measured"):
                sources.append(_from_gpu(path, f"{folder.name}/{gpu.name}/{path.name}", content))
                break
    return sources


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _damaged(path: Path, why: str) -> PageError:
    return PageError(f"{path} is damaged ({why}); restore it from git, or measure again")


def _from_harness(path: Path, label: str) -> Source:
    content = _read(path)
    try:
        results = [dict(result) for result in content]
        for result in results:
            _check(result)
        results.sort(key=lambda result: natural(result["name"]))
        machines = dict.fromkeys(str(result["machine"]) for result in results)
        rates = [result["ceilings"] for result in results if result.get("ceilings")]
        chip = _chip(", ".join(machines), rates[-1]) if rates else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return Source(label, "; ".join(machines) or "no machine", results, chip=chip)


def _from_gpu(path: Path, label: str, content: Mapping[str, Any]) -> Source:
    try:
        machine = str(content["machine"]["gpu"])
        facts = {
            "date": content["date"],
            "commit": f"{content['commit']}{' with changes' if content.get('changed_files') else ''}",
            "versions": {key: content["versions"][key] for key in ("torch", "triton") if key in content["versions"]},
        }
        results = [{**_case(case), **facts, "machine": machine} for case in content["cases"]]
        for result in results:
            _check(result)
        chip = _chip(machine, content["ceilings"]) if content.get("ceilings") else None
        notes = [
            f"Equivalence tests of {name}: {found['passed']} passed, {len(found['failed'])} failed."
            for name, found in content.get("equivalence", {}).items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return Source(label, machine, results, notes, chip)


def _case(case: Mapping[str, Any]) -> dict[str, Any]:
    """A case of `make gpu` as the harness would have written it."""
    contenders: dict[str, dict[str, Any]] = {}
    for name, entry in case.get("contenders", {}).items():
        if "median_us" not in entry:
            contenders[name] = {how: entry[how] for how in ("failed", "skipped") if how in entry}
            continue
        made = contenders[name] = {"median_ms": 1e-3 * entry["median_us"], "error": entry["relative_error"]}
        if entry.get("peak_bytes") is not None:
            made["peak_mib"] = entry["peak_bytes"] / 2**20
        made.update({"speed": entry["speed"]} if "speed" in entry else {})
        made.update({"of_floor": entry["fraction_of_floor"]} if "fraction_of_floor" in entry else {})
    rounds = next((entry["rounds"] for entry in case.get("contenders", {}).values() if "rounds" in entry), None)
    return {
        "name": case["name"],
        "baseline": case.get("baseline"),
        "sizes": {},
        "rounds": rounds,
        "contenders": contenders,
        **({"refused": case["refused"]} if "refused" in case else {}),
    }


def _check(result: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError for a result that cannot be shown."""
    if not isinstance(result["name"], str):
        raise TypeError(f"the name {result['name']!r} is no text")
    where = result["name"]
    for name, entry in result["contenders"].items():
        if "median_ms" in entry:
            figures = [
                entry[key] for key in ("median_ms", "speed", "error", "images_per_s", "peak_mib") if key in entry
            ]
            if not all(value is None or isinstance(value, int | float) for value in figures):
                raise TypeError(f"a figure of {name!r} in {where!r} is no number")
        elif "failed" not in entry and "skipped" not in entry:
            raise ValueError(f"{name!r} in {where!r} has neither a time nor a reason for having none")
    if not all(isinstance(value, int) and value > 0 for value in (result.get("sizes") or {}).values()):
        raise ValueError(f"sizes of {where!r} are not positive whole numbers")


def _chip(machine: str, rates: Mapping[str, float]) -> Chip:
    """Measured rates."""
    return Chip(machine, float(rates["matrix_flops_per_second"]), float(rates["copy_bytes_per_second"]))


def natural(text: str) -> list[tuple[bool, int, str]]:
    """A key that sorts numbers within text by their size."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", text)]
