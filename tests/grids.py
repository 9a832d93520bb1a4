"""Grids of test cases: some run always, the others in the slow tier."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def grid(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with all combinations of its axes' values.

    Those that are not in the `pairwise` selection are marked slow. Names and order of the parameters are those of the
    axes.
    """
    values = [list(axis) for axis in axes.values()]
    always = set(pairwise([len(axis) for axis in values]))
    cases = []
    for place in itertools.product(*map(range, map(len, values))):
        marks = () if place in always else pytest.mark.slow
        case = [axis[i] for axis, i in zip(values, place, strict=True)]
        cases.append(pytest.param(*case, marks=marks, id=" ".join(map(str, case))))
    return pytest.mark.parametrize(tuple(axes), cases)


def pairwise(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Select combinations of indices so that any two axes show each pair of their values at least once."""
    combinations = itertools.product(*map(range, sizes))
    return covering({c: set(itertools.combinations(enumerate(c), min(2, len(sizes)))) for c in combinations})


def covering(facets: Mapping[T, AbstractSet[Any]]) -> list[T]:
    """Select keys so that each facet of any key is one of a selected key.

    Greedy: the key with the most new facets comes next, the earliest of several.
    """
    missing = set().union(*facets.values())
    selected = []
    while missing:
        best = max(facets, key=lambda key: len(facets[key] & missing))
        selected.append(best)
        missing -= facets[best]
    return selected


def slow(*values: Any) -> Any:
    """Return one case of a parametrized test that only the slow tier runs."""
    return pytest.param(*values, marks=pytest.mark.slow)
