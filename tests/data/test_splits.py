from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fastbgad.data import Category, Sample, Split, split_known_anomalies
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


def test_a_category_without_anomalies():
    category = replace(make_category(), test=make_category({}).test)
    for number in (0, None):
        assert split_known_anomalies(category, number) == Split(category.train, (), category.test)
    for per_type in (False, True):
        with pytest.raises(DataError, match=r"num_anomalies is 2 but widget has no anomalous images; .*--method nfad"):
            split_known_anomalies(category, 2, per_type)
    with pytest.raises(DataError, match="no anomaly type 'crack'; it holds no anomalous images"):
        split_known_anomalies(category, 0, types=["crack"])


@pytest.mark.parametrize(
    ("counts", "options", "known"),
    [
        ({"crack": 2}, {}, {"crack": 1}),
        ({"crack": 3}, {}, {"crack": 1}),
        ({"crack": 4}, {}, {"crack": 2}),
        ({"crack": 19}, {}, {"crack": 9}),
        ({"crack": 20}, {}, {"crack": 10}),
        ({"crack": 70}, {}, {"crack": 10}),
        ({"crack": 7, "dent": 40, "stain": 1}, {"per_type": True}, {"crack": 3, "dent": 10}),
        ({"crack": 5, "dent": 40}, {"types": ["crack"]}, {"crack": 2}),
    ],
)
def test_half_at_most_where_no_number_is_given(counts, options, known):
    category = make_category(counts)
    split = split_known_anomalies(category, **options)
    assert Counter(s.defect for s in split.known_anomalies) == known
    assert len(split.test) == len(category.test) - sum(known.values())
    explicit = {} if options.get("per_type") else {"num_anomalies": sum(known.values())}
    if explicit:
        assert split == split_known_anomalies(category, **explicit, **options)


def test_half_of_one_image():
    with pytest.raises(DataError, match=r"widget has only one anomalous image, crack/0.png.*--method nfad"):
        split_known_anomalies(make_category({"crack": 1}))
    assert split_known_anomalies(make_category({"crack": 1}), 0).known_anomalies == ()
    few = make_category({"crack": 1, "dent": 1})
    assert len(split_known_anomalies(few).known_anomalies) == 1
    with pytest.raises(DataError, match=r"only one anomalous image of each type.*draw in total"):
        split_known_anomalies(few, per_type=True)
    with pytest.raises(DataError, match=r"only one anomalous image of crack.*num_anomalies to 1"):
        split_known_anomalies(few, types=["crack"])
    assert len(split_known_anomalies(few, 1, types=["crack"]).known_anomalies) == 1


def test_images_set_aside_for_training_spare_the_test():
    aside = make_category({"rust": 12, "scratch": 3}).test
    category = replace(make_category(), known=tuple(s for s in aside if s.label))
    for options, number in (({}, 10), ({"num_anomalies": 15}, 15), ({"per_type": True}, 13), ({"types": ["rust"]}, 10)):
        split = split_known_anomalies(category, **options)
        assert len(split.known_anomalies) == number
        assert set(split.known_anomalies) <= set(category.known)
        assert split.test == category.test
    assert len(split_known_anomalies(replace(category, known=category.known[:1])).known_anomalies) == 1
    with pytest.raises(DataError, match=r"num_anomalies is 16 in total .* 15 anomalous images \(rust 12, scratch 3\)"):
        split_known_anomalies(category, 16)
    with pytest.raises(DataError, match="no anomaly type 'dent'; it holds rust, scratch"):
        split_known_anomalies(category, 1, types=["dent"])


def test_unknown_types_are_suggested():
    with pytest.raises(DataError, match=r"no anomaly type 'crak'; did you mean crack\? it holds crack, dent, stain"):
        split_known_anomalies(make_category(), 1, types=["crak"])
    with pytest.raises(DataError, match="no anomaly type 'good'"):
        split_known_anomalies(make_category(), 1, types=["good"])


@pytest.mark.parametrize("arguments", [{"num_anomalies": -1}, {"seed": -1}, {"types": []}, {"types": "dent"}])
def test_impossible_options(arguments):
    with pytest.raises(ConfigError):
        split_known_anomalies(make_category(), **arguments)
