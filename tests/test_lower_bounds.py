"""The lower bounds in pyproject.toml: read correctly, and the same wherever one of them is repeated."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from fastbgad.kernels.triton_version import LOWEST
from tests import ROOT
from tests.lower_bounds import PYPROJECT, BoundsError, lower_bounds

PROJECT = tomllib.loads(PYPROJECT.read_text())["project"]


def test_every_form_of_a_requirement() -> None:
    project = {
        "name": "widget",
        "dependencies": ["torch>=2.8", "FrEIA==0.2"],
        "optional-dependencies": {
            "kernels": ["triton>=3.4; sys_platform == 'linux'"],
            "ray": ["ray[data] >= 2.40", "torch>=2.8"],
            "dev": ["widget[kernels,ray]"],
        },
    }
    assert lower_bounds(project) == {"torch": "2.8", "freia": "0.2", "triton": "3.4", "ray": "2.40"}


@pytest.mark.parametrize("requirement", ["torch", "torch<3", "torch>=2.8,<3", "torch~=2.8"])
def test_a_requirement_without_one_lower_bound_is_named(requirement: str) -> None:
    with pytest.raises(BoundsError, match=re.escape(repr(requirement))):
        lower_bounds({"name": "widget", "dependencies": [requirement]})


def test_two_bounds_of_one_package_are_named() -> None:
    extras = {"plots": ["numpy>=2"]}
    with pytest.raises(BoundsError, match=r"numpy is bounded by 1\.26 and by 2"):
        lower_bounds({"name": "widget", "dependencies": ["numpy>=1.26"], "optional-dependencies": extras})


def test_the_command_prints_constraints() -> None:
    lines = subprocess.check_output([sys.executable, "tests/lower_bounds.py"], cwd=ROOT, text=True).splitlines()
    assert f"torch=={lower_bounds(PROJECT)['torch']}" in lines
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


def test_triton_is_checked_against_the_declared_bound() -> None:
    assert lower_bounds(PROJECT)["triton"] == ".".join(map(str, LOWEST))


def test_what_the_tests_run_with_is_pinned() -> None:
    """Every declared package has a version in constraints.txt that its lower bound admits."""
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[name.lower()] = version
    bounds = lower_bounds(PROJECT)
    assert set(bounds) <= set(pinned)
    numbers = lambda version: [int(part) for part in re.findall(r"\d+", version)]  # noqa: E731
    assert all(numbers(bound) <= numbers(pinned[name]) for name, bound in bounds.items())
