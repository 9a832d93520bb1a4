"""The rules that a kernel's resources must keep: limits of the chips, and the stored budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..triton_version import triton_version
from .compilation import Resources, ResourcesError
from .table import Row

BUDGET = Path(__file__).parents[1] / "budget.json"
UPDATE = "python -m fastbgad.kernels.resources --update-budget"

# Shared memory that one program may use, in bytes, by compute capability (CUDA programming guide, "opt-in" maximum).
# 8.0 itself has 166,912; what compiles for it also runs on 8.6 and 8.9, which have less.
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
TENSOR_COLUMNS = 512  # tensor memory of an sm_100 multiprocessor


def broken_rules(rows: Sequence[Row]) -> list[str]:
    """Return one line per broken rule that no budget can allow."""
    broken = []
    for name, arch, needs, problem, _ in rows:
        where = f"{name} on sm_{arch}"
        if needs is None:
            broken.append(f"{where}: does not compile ({problem})")
            continue
        if needs.local_in_loops:
            broken.append(f"{where}: {needs.local_in_loops} loads and stores of local memory in innermost loops")
        if needs.shared_bytes > SHARED_LIMIT[arch]:
            broken.append(f"{where}: {needs.shared_bytes} bytes of shared memory, the chip has {SHARED_LIMIT[arch]}")
        if needs.tensor_columns > TENSOR_COLUMNS:
            broken.append(f"{where}: {needs.tensor_columns} columns of tensor memory, the chip has {TENSOR_COLUMNS}")
    return broken


def over_budget(rows: Sequence[Row], budget: Mapping[str, Mapping[str, Any]], complete: bool) -> list[str]:
    """Return one line per row beyond the budget; `complete` also reports entries of the budget without a variant."""
    broken = []
    for name, arch, needs, _, _ in rows:
        if needs is None:
            continue
        stored = budget.get(name, {}).get(str(arch))
        if stored is None:
            broken.append(f"{name} on sm_{arch}: not in the budget; if its table is as it should be: {UPDATE}")
            continue
        for key, value in _budget_entry(needs).items():
            if value != stored.get(key) if key == "matrix_unit" else value > stored.get(key, -1):
                broken.append(
                    f"{name} on sm_{arch}: {key} is {value or 'none'}, the budget says {stored.get(key) or 'none'}"
                )
    if complete:
        names = {row.variant for row in rows}
        broken += [f"{name}: in the budget but no kernel has it; {UPDATE}" for name in sorted(set(budget) - names)]
    return broken


def _budget_entry(needs: Resources) -> dict[str, Any]:
    """Return the resources that a budget bounds."""
    return {key: getattr(needs, key) for key in ("registers", "stack_bytes", "shared_bytes", "matrix_unit")}


def read_budget(path: Path) -> dict[str, Any]:
    """Return the stored budget: {"triton": version, "variants": {variant: {arch: entry}}}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content["variants"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ResourcesError(f"{path} is not a readable budget ({error!r}); write it with: {UPDATE}") from error
    return content


def updated_budget(budget: Mapping[str, Any], rows: Sequence[Row], complete: bool) -> dict[str, Any]:
    """Return the budget with the rows in it; variants that were not compiled stay, or are dropped if `complete`."""
    variants = {} if complete else {name: dict(entry) for name, entry in budget["variants"].items()}
    for row in rows:
        if row.resources is not None:
            variants.setdefault(row.variant, {})[str(row.arch)] = _budget_entry(row.resources)
    return {"triton": triton_version(), "variants": variants}
