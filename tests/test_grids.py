"""The selection of a grid's cases that always run."""

from __future__ import annotations

import itertools

import pytest

from tests.conftest import LONGEST, TESTS
from tests.grids import grid, pairwise


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (4, 3, 2), (14, 2, 2, 2, 2), (2, 5, 3, 3)])
def test_every_pair_of_values_is_selected(sizes: tuple[int, ...]) -> None:
    selected = pairwise(sizes)
    assert len(selected) == len(set(selected))
    for first, second in itertools.combinations(range(len(sizes)), 2):
        pairs = {(case[first], case[second]) for case in selected}
        assert pairs == set(itertools.product(range(sizes[first]), range(sizes[second])))
    assert {case[0] for case in selected} == set(range(sizes[0]))
    least, most = sorted([1, *sizes])[-2:]
    assert least * most <= len(selected) <= 1.5 * least * most


def test_the_others_are_slow() -> None:
    mark = grid(a=[1, 2], b="xy", c=[None, True])
    names, cases = mark.args
    assert names == ("a", "b", "c")
    assert {case.values for case in cases} == set(itertools.product([1, 2], "xy", [None, True]))
    assert len([case for case in cases if not case.marks]) == len(pairwise((2, 2, 2)))
    assert all(mark.name == "slow" for case in cases for mark in case.marks)


def test_the_longest_files_are_there() -> None:
    """Renamed files would silently lose their place."""
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []
