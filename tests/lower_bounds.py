"""Print every lower bound that pyproject.toml declares as an exact version: pip's constraints for `make test-lowest`.

    python tests/lower_bounds.py > constraints.txt

Needs nothing but Python, because it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"

# A name, extras, one clause with a version, and what the clause depends on: "ray[data]>=2.40; sys_platform == 'linux'".
_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[[^]]*\])?\s*(>=|==)\s*([\w.]+)\s*(?:;.*)?")


class BoundsError(ValueError):
    """A requirement of pyproject.toml has no lower bound, or two that differ; the message names it."""


def lower_bounds(project: Mapping[str, Any]) -> dict[str, str]:
    """Return the lower bound of every package that a project's dependencies and extras name.

    Args:
        project: the table `project` of a pyproject.toml.

    Raises:
        BoundsError: a requirement without a bound, or one package with two bounds.
    """
    extras = project.get("optional-dependencies", {})
    bounds: dict[str, str] = {}
    for requirement in [*project.get("dependencies", ()), *(one for extra in extras.values() for one in extra)]:
        if requirement.startswith(f"{project['name']}["):  # extras that another extra takes in
            continue
        found = _REQUIREMENT.fullmatch(requirement)
        if found is None:
            raise BoundsError(f"pyproject.toml: {requirement!r} has no lower bound; write it as NAME>=VERSION")
        name, version = found[1].lower(), found[3]
        if bounds.setdefault(name, version) != version:
            raise BoundsError(f"pyproject.toml: {name} is bounded by {bounds[name]} and by {version}; choose one")
    return bounds


def main() -> int:
    """Print one line per package; return 2 where pyproject.toml does not give the bounds."""
    try:
        bounds = lower_bounds(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"])
    except BoundsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{name}=={version}" for name, version in bounds.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
