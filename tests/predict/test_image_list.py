"""Lists of images: the order of the sorted paths, every name whole, nothing twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastbgad.data.files import IMAGE_SUFFIXES
from fastbgad.errors import DataError, OutputError
from fastbgad.predict.image_list import iterate_images, read_part, write_list

NAMES = (
    "b.png",
    "a/c.png",
    "a.png",
    "a b/c.JPG",
    "a-b.png",
    "a/b/d.webp",
    "a/z\nz.png",
    "ä/é.png",
    ".hidden.png",
    "Z.png",
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name in (*NAMES, "a/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "a.bmp").mkdir()  # a folder whose name looks like an image's
    (folder / "a.bmp" / "e.png").touch()
    (folder / "link").symlink_to(folder / "a")
    (folder / "linked.png").symlink_to(folder / "b.png")
    return folder


def test_folders_in_the_order_of_sorted_paths(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sorted(p for p in photos.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    assert len(expected) == len(NAMES) + 2
    assert list(iterate_images([photos])) == [str(path) for path in expected]
    monkeypatch.chdir(photos)
    assert list(iterate_images(["./"])) == [str(path.relative_to(photos)) for path in expected]
    assert list(iterate_images(["./a/"])) == ["a/b/d.webp", "a/c.png", "a/z\nz.png"]


def test_every_image_once(photos: Path) -> None:
    found = list(iterate_images([photos / "a.png", photos, f"{photos}/**/*.png"]))
    assert found[0] == str(photos / "a.png")
    assert len(found) == len(set(found))
    # The glob, and only it, follows the link to a folder with two PNG files; it does not see hidden ones.
    assert sorted(path for path in found if "/link/" in path) == [f"{photos}/link/c.png", f"{photos}/link/z\nz.png"]
    assert len(found) == len(NAMES) + 2 + 2


def test_the_folder_of_the_output_is_left_out(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    found = list(iterate_images([photos], leave_out="photos/a"))
    assert str(photos / "a.png") in found
    assert not [path for path in found if path.startswith(f"{photos}/a/")]


def test_nothing_found(photos: Path) -> None:
    (photos / "empty").mkdir()
    for patterns, message in (
        ([], "no image to score"),
        ([photos / "empty"], "holds no images"),
        ([photos / "none*.png"], "matches nothing"),
    ):
        with pytest.raises(DataError, match=message):
            list(iterate_images(patterns))


def test_parts_give_back_the_names(tmp_path: Path) -> None:
    names = [os.fsdecode(name) for name in (b"a.png", b"two\nlines.png", b"\xff\xfe.png", "ü.png".encode(), b"z.png")]
    written = write_list(tmp_path / "images.list", iter(names), 2)
    assert written.count == 5
    assert [part.count for part in written.parts] == [2, 2, 1]
    parts = [read_part(tmp_path / "images.list", part) for part in written.parts]
    assert [str(path) for part in parts for path in part] == names
    assert write_list(tmp_path / "other", iter(names), 5).sha256 == written.sha256
    assert write_list(tmp_path / "other", iter(names[::-1]), 5).sha256 != written.sha256
    (tmp_path / "images.list").write_bytes((tmp_path / "images.list").read_bytes()[:-3])
    with pytest.raises(OutputError, match="not the list that was written"):
        read_part(tmp_path / "images.list", written.parts[-1])
