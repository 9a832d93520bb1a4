"""Finding the data sets: by the names of their categories, wherever they lie; what is missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbgad.errors import DataError, DatasetProblemsError
from fastbgad.experiments.plan.sources import categories_of, find_sources
from tests.cells import some_cells
from tests.make_data import make_btad, make_mvtec


def carpet(root: Path) -> Path:
    return make_mvtec(root, "carpet", normals=2, per_type=1, size=16)


@pytest.mark.parametrize("folder", ["", "mvtec", "MVTec_AD", "mvtec_anomaly_detection", "mvtec/carpet"])
def test_a_data_set_may_lie_in_several_ways(tmp_path: Path, folder: str) -> None:
    named = tmp_path / "x"
    root = named / folder
    if folder == "mvtec/carpet":
        root, named = root.parent, root
    carpet(root)
    sources = find_sources([named])
    assert set(sources.folders) == {("mvtec", "carpet")}
    category = sources.open("mvtec", "carpet")
    assert (category.name, category.layout, len(category.train)) == ("carpet", "mvtec", 2)


def test_data_sets_are_told_apart_by_their_categories(tmp_path: Path) -> None:
    carpet(tmp_path)
    make_mvtec(tmp_path, "widget", size=16)
    make_btad(tmp_path / "BTech_Dataset_transformed", "03", size=16)
    make_btad(tmp_path / "other", "01", size=16)
    (tmp_path / "mvtec_readme.txt").write_text("")
    sources = find_sources([tmp_path])
    assert set(sources.folders) == {("mvtec", "carpet"), ("btad", "03")}
    assert sources.open("btad", "03").layout == "btad"
    assert set(find_sources([tmp_path, tmp_path / "other"]).folders) == {*sources.folders, ("btad", "01")}


def test_the_first_folder_wins(tmp_path: Path) -> None:
    for part in ("a", "b"):
        carpet(tmp_path / part)
    found = find_sources([tmp_path / "b", tmp_path / "a"])
    assert found.folders[("mvtec", "carpet")] == tmp_path / "b" / "carpet"


def test_what_is_missing_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    carpet(tmp_path / "mvtec")
    sources = find_sources([tmp_path])
    with pytest.raises(DataError, match="category screw of MVTec AD was not found in") as error:
        sources.open("mvtec", "screw")
    assert str(tmp_path / "mvtec") in str(error.value)
    with pytest.raises(DataError, match="BTAD was not found: neither 01 nor another"):
        sources.open("btad", "01")


def test_a_faulty_category_lists_its_problems(tmp_path: Path) -> None:
    folder = carpet(tmp_path)
    next((folder / "ground_truth").rglob("*.png")).write_bytes(b"")
    sources = find_sources([tmp_path])
    with pytest.raises(DatasetProblemsError, match=r"_mask\.png"):
        sources.open("mvtec", "carpet")
    assert sources.open("mvtec", "carpet", check="none").name == "carpet"
    (tmp_path / "screw").mkdir()
    with pytest.raises(DataError, match="screw"):
        find_sources([tmp_path]).open("mvtec", "screw")


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_sources([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="--data"):
        find_sources([])


def test_categories_of_cells() -> None:
    assert categories_of(some_cells(("screw", "carpet"))) == (("mvtec", "screw"), ("mvtec", "carpet"))
