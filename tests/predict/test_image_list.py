"""Lists of images: the order of the sorted paths, every name whole, nothing twice."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbgad.data.files import IMAGE_SUFFIXES
from fastbgad.errors import DataError, Notice, OutputError
from fastbgad.predict.image_list import iterate_images, read_part, write_list

# Links to a folder that is searched anyway, and hidden names, are in the folder of many tests.
pytestmark = pytest.mark.filterwarnings("ignore:left out")

NAMES = (
    "b.png",
    "a/c.png",
    "a.png",
    "a b/c.JPG",
    "a-b.png",
    "a/b/d.webp",
    "a/z\nz.png",
    "ä/é.png",
    "Z.png",
)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(*patterns: object, leave_out: object = None) -> tuple[list[str], list[str]]:
    """Return the images and the notices."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = list(iterate_images(patterns, leave_out))
    assert all(warning.category is Notice for warning in caught)
    return images, [str(warning.message) for warning in caught]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    # One folder's name looks like an image's.
    folder = touch(tmp_path / "photos", *NAMES, "a/notes.txt", ".hidden.png", ".thumbnails/a.png", "a.bmp/e.png")
    (folder / "link").symlink_to(folder / "a")
    (folder / "linked.png").symlink_to(folder / "b.png")
    return folder


def test_folders_in_the_order_of_sorted_paths(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sorted(
        p
        for p in photos.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and "/." not in str(p) and "/link/" not in str(p)
    )
    assert len(expected) == len(NAMES) + 2
    assert list(iterate_images([photos])) == [str(path) for path in expected]
    monkeypatch.chdir(photos)
    assert list(iterate_images(["./"])) == [str(path.relative_to(photos)) for path in expected]
    assert list(iterate_images(["./a/"])) == ["a/b/d.webp", "a/c.png", "a/z\nz.png"]


def test_every_image_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    (photos / "up").symlink_to(photos)  # a glob's ** follows it without end
    patterns = [photos / "a.png", "./a.png", photos, f"{photos}/**/*.png", f"{photos}/**", photos / "link", "a"]
    images = list(iterate_images(patterns))
    assert images[0] == str(photos / "a.png")
    real = {os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) for path in images}
    assert len(images) == len(real) == len(NAMES) + 2
    (photos.parent / "line2").mkdir()
    (photos.parent / "line2" / "f.png").touch()
    (photos / "line2").symlink_to(photos.parent / "line2")
    assert [path for path in iterate_images([photos]) if "f.png" in path] == [f"{photos}/line2/f.png"]


def test_what_is_left_out_is_told_once(photos: Path) -> None:
    images, notices = found(photos)
    assert not [path for path in images if "/." in path]
    assert notices == [
        f"left out of {photos}: 1 file with a hidden name (.hidden.png); 1 folder with a hidden name (.thumbnails); "
        "1 link to a folder that is searched anyway (link)"
    ]
    other = touch(photos.parent / "other", "a.heic", "b.png", "c.png")
    assert found(photos / "a", other) == (
        [*iterate_images([photos / "a"]), f"{other}/b.png", f"{other}/c.png"],
        [f"left out of {other}: 1 file with the suffix .heic, which is not read (a.heic)"],
    )
    _, (notice,) = found(photos, other)
    assert notice.startswith(f"left out: 1 file with a hidden name ({photos}/.hidden.png); ")
    assert notice.endswith(f"1 file with the suffix .heic, which is not read ({other}/a.heic)")
    assert found(other / "b.png") == ([f"{other}/b.png"], [])


def test_many_folders_count_as_one(tmp_path: Path) -> None:
    folders = [touch(tmp_path / f"{number}", "a.png", "._a.png") for number in range(9)]
    _, (notice,) = found(*folders)
    assert notice.startswith("left out: 9 files with a hidden name (")
    assert notice.endswith("and 6 more)")


def test_a_file_that_is_named_is_taken(tmp_path: Path) -> None:
    names = (".hidden.png", ".cache/a.png", "scan", "photo.xyz", "photo[1].png")
    touch(tmp_path, *names)
    (tmp_path / "gone").symlink_to(tmp_path / "annex")
    patterns = [tmp_path / name for name in (*names, "gone")]
    assert found(*patterns) == ([str(path) for path in patterns], [])
    assert found(tmp_path / ".cache") == ([f"{tmp_path}/.cache/a.png"], [])
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="pipe, a socket or a device"):
        found(tmp_path / "pipe.png")


def test_links_without_a_target_are_found(tmp_path: Path) -> None:
    """What git-annex and DVC leave: reading them tells what to do."""
    (tmp_path / "a.png").symlink_to(tmp_path / "annex" / "key")
    assert found(tmp_path) == found(f"{tmp_path}/*") == ([f"{tmp_path}/a.png"], [])


def test_folders_that_a_glob_matches_are_searched(tmp_path: Path) -> None:
    touch(tmp_path, "1/a.png", "1/sub/b.png", "1/._a.png", "1/c.heic", "2/a.png", "d.png", "e.heic", "notes.txt")
    (tmp_path / "1-empty").mkdir()
    expected = [f"{tmp_path}/{name}" for name in ("1/a.png", "1/sub/b.png", "2/a.png", "d.png")]
    images, (notice,) = found(f"{tmp_path}/*")
    assert images == expected
    assert notice == (
        f"left out of {tmp_path}/*: 1 file with a hidden name ({tmp_path}/1/._a.png); "
        f"1 file with the suffix .heic, which is not read ({tmp_path}/1/c.heic); "
        f"2 files whose suffix is not that of an image ({tmp_path}/e.heic, {tmp_path}/notes.txt)"
    )
    # Also where the glob matches what lies in those folders; all is counted once.
    images, (notice,) = found(f"{tmp_path}/**")
    assert images == expected
    assert "1 file with a hidden name" in notice
    assert "2 files with the suffix .heic" in notice
    assert found(f"{tmp_path}/?/")[0] == found(f"{tmp_path}/[12]")[0] == expected[:-1]
    assert found(f"{tmp_path}/1/._*") == ([f"{tmp_path}/1/._a.png"], [])
    os.mkfifo(tmp_path / "f.png")
    assert "1 file that is not a regular one" in found(f"{tmp_path}/*.png")[1][0]


@pytest.mark.parametrize("spelled", [str, os.path.relpath, lambda path: f"{path}/../scores/"])
def test_the_folder_of_the_output_is_left_out(tmp_path: Path, spelled: Callable[[Path], str]) -> None:
    photos = touch(tmp_path / "photos", "a.png", "scores/maps/a.png", "scores/b.png")
    out = photos / "scores"
    (tmp_path / "link").symlink_to(out)
    for leave_out in (spelled(out), tmp_path / "link"):
        notice = f"left out of {photos}: 1 folder that results are written to (scores)"
        assert found(photos, leave_out=leave_out) == ([f"{photos}/a.png"], [notice])
        # What photos/* becomes in a shell, and quoted.
        for patterns in ([photos / "a.png", out / "maps"], [photos / "a.png", out / "maps" / "a.png"]):
            images, (notice,) = found(*patterns, leave_out=leave_out)
            assert images == [f"{photos}/a.png"]
            assert "that results are written to" in notice
        assert found(photos / "*.png", out, leave_out=leave_out)[0] == [f"{photos}/a.png", f"{out}/b.png"]
        (out / "b.png").rename(tmp_path / "kept.png")
        assert found(photos / "*.png", out, leave_out=leave_out)[0] == [f"{photos}/a.png"]
        assert found(photos / "*", leave_out=leave_out)[0] == [f"{photos}/a.png"]
        assert found(photos / "**" / "*.png", leave_out=leave_out)[0] == [f"{photos}/a.png"]
        (tmp_path / "kept.png").rename(out / "b.png")
        with pytest.raises(DataError, match=r"no image that is read: left out .*choose another output folder"):
            found(out / "maps", leave_out=leave_out)


def test_the_output_beside_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--out photos, or the folder above: of it only the results are left out."""
    results = ("maps/a.png", "maps/000001/a.png", "shards/000001.csv", "attempts/000001", "images.list", "scores.csv")
    photos = touch(tmp_path / "photos", "a.png", "b/c.png", *results)
    expected = [f"{photos}/a.png", f"{photos}/b/c.png"]
    images, (notice,) = found(photos, leave_out=photos)
    assert images == expected
    assert notice == (
        f"left out of {photos}: 3 folders that results are written to (attempts, maps, shards)"  # and nothing else
    )
    touch(tmp_path, "maps/z.png")
    assert found(photos / "b", photos / "a.png", leave_out=photos) == (expected[::-1], [])
    monkeypatch.chdir(photos)
    assert found(".", leave_out=".")[0] == ["a.png", "b/c.png"]
    monkeypatch.chdir(tmp_path)
    assert found("photos/b", leave_out=".") == (["photos/b/c.png"], [])
    assert found(".", leave_out=".")[0] == [
        "photos/a.png",
        "photos/b/c.png",
        "photos/maps/000001/a.png",
        "photos/maps/a.png",
    ]
    # A name that is wrong is told, wherever it would be.
    with pytest.raises(DataError, match="matches nothing"):
        found(photos / "a.png", photos / "none.png", leave_out=photos)


def test_nothing_found(photos: Path) -> None:
    (photos / "empty").mkdir()
    only = touch(photos.parent / "only", "._a.png", "b.heic", "c.heic")
    for patterns, message in (
        ([], "no image to score"),
        ([photos / "empty"], "holds no images"),
        ([photos / "none*.png"], "matches nothing"),
        ([""], "matches nothing"),
        ([photos / "empt*"], "only matches folders without images"),
        ([photos / "a" / "*.txt"], r"\*\.txt names no image that is read: left out 1 file whose suffix .*notes\.txt"),
        (
            [photos, only],
            r"only holds no image that is read: left out 1 file with a hidden name \(\._a\.png\); "
            r"2 files with the suffix \.heic, which is not read \(b\.heic, c\.heic\); to have a file tried, name it",
        ),
    ):
        with pytest.raises(DataError, match=message):
            list(iterate_images(patterns))


def test_names_come_one_by_one(tmp_path: Path) -> None:
    """Not only when all folders have been read."""
    touch(tmp_path, "a/1.png", "b/2.png")
    images = iterate_images([tmp_path])
    assert next(images) == f"{tmp_path}/a/1.png"
    touch(tmp_path, "b/3.png")
    assert list(images) == [f"{tmp_path}/b/2.png", f"{tmp_path}/b/3.png"]


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
