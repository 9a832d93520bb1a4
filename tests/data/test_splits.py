from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastbgad.data import Category, Sample, split_known_anomalies
from fastbgad.errors import ConfigError, DataError

COUNTS = {"crack": 6, "dent": 9, "stain": 4}


def make_category(counts: dict[str, int] = COUNTS) -> Category:
    train = tuple(Sample(Path(f"train/good/{i}.png"), None, 0, "good") for i in range(5))
    good = [Sample(Path(f"test/good/{i}.png"), None, 0, "good") for i in range(3)]
    bad = [Sample(Path(f"test/{d}/{i}.png"), Path(f"gt/{d}/{i}.png"), 1, d) for d in counts for i in range(counts[d])]
    return Category("widget", Path("widget"), "mvtec", train, tuple(sorted(good + bad, key=lambda s: s.defect)))


def test_known_anomalies_leave_the_test():
    category = make_category()
    split = split_known_anomalies(category, 10)
    assert split.normals == category.train
    assert len(split.known_anomalies) == 10
    assert all(s.label == 1 for s in split.known_anomalies)
    assert not set(split.known_anomalies) & set(split.test)
    assert set(split.known_anomalies) | set(split.test) == set(category.test)
    assert sum(s.label == 0 for s in split.test) == 3
    assert [s for s in category.test if s in split.test] == list(split.test)


def test_the_seed_decides():
    category = make_category()
    assert split_known_anomalies(category, 5, seed=3) == split_known_anomalies(category, 5, seed=3)
    assert len({split_known_anomalies(category, 5, seed=seed).known_anomalies for seed in range(20)}) > 10


def test_every_anomaly_can_be_drawn():
    category = make_category()
    drawn = {s for seed in range(100) for s in split_known_anomalies(category, 3, seed=seed).known_anomalies}
    assert len(drawn) == sum(COUNTS.values())


def test_per_type():
    split = split_known_anomalies(make_category(), 3, per_type=True)
    assert [s.defect for s in split.known_anomalies] == ["crack"] * 3 + ["dent"] * 3 + ["stain"] * 3
    draws = {split_known_anomalies(make_category(), 3, per_type=True, seed=s).known_anomalies for s in range(10)}
    assert len(draws) > 5


def test_per_type_draws_do_not_depend_on_other_types():
    few = split_known_anomalies(make_category({"crack": 6, "stain": 4}), 2, per_type=True)
    more = split_known_anomalies(make_category(), 2, per_type=True)
    assert [s for s in more.known_anomalies if s.defect != "dent"] == list(few.known_anomalies)


def test_one_class_setting():
    split = split_known_anomalies(make_category(), 4, types=["dent"])
    assert {s.defect for s in split.known_anomalies} == {"dent"}
    assert {s.defect for s in split.test} == {"crack", "dent", "good", "stain"}
    assert len(split_known_anomalies(make_category(), 9, types=["dent"]).known_anomalies) == 9


def test_none_at_all():
    split = split_known_anomalies(make_category(), 0)
    assert split.known_anomalies == ()
    assert split.test == make_category().test


def test_more_than_there_are():
    with pytest.raises(DataError, match=r"num_anomalies is 20 in total but widget has 19 .*crack 6, dent 9, stain 4"):
        split_known_anomalies(make_category(), 20)
    with pytest.raises(DataError, match="num_anomalies is 5 per type but widget has 19"):
        split_known_anomalies(make_category(), 5, per_type=True)
    with pytest.raises(DataError, match=r"widget has 4 anomalous images \(stain 4\)"):
        split_known_anomalies(make_category(), 5, types=["stain"])


def test_none_left_for_the_test():
    with pytest.raises(DataError, match="all 19 anomalous images of widget"):
        split_known_anomalies(make_category(), 19)


def test_a_category_without_anomalies_has_none_left():
    category = make_category()
    with pytest.raises(DataError, match="widget"):
        split_known_anomalies(replace(category, test=category.train), 0)


def test_unknown_types_are_suggested():
    with pytest.raises(DataError, match=r"no anomaly type 'crak'; did you mean crack\? it holds crack, dent, stain"):
        split_known_anomalies(make_category(), 1, types=["crak"])
    with pytest.raises(DataError, match="no anomaly type 'good'"):
        split_known_anomalies(make_category(), 1, types=["good"])


@pytest.mark.parametrize("arguments", [{"num_anomalies": -1}, {"seed": -1}, {"types": []}, {"types": "dent"}])
def test_impossible_options(arguments):
    with pytest.raises(ConfigError):
        split_known_anomalies(make_category(), **arguments)
