from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastbgad.data.files import IMAGE_SUFFIXES, ImageSearch


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def found(root: Path, **options) -> tuple[list[str], dict[str, int]]:
    search = ImageSearch(**options)
    images = list(search.below(str(root)))
    return [os.path.relpath(path, root) for path in images], dict(search.skipped.counts)


def test_every_suffix_at_every_depth_in_the_order_of_names(tmp_path):
    names = [f"{'abc'[n % 3]}/{n:02d}{suffix.upper() if n % 2 else suffix}" for n, suffix in enumerate(IMAGE_SUFFIXES)]
    touch(tmp_path, *names, "b/deeper/still/x.png", "license.txt", "split.csv")
    assert found(tmp_path) == (sorted([*names, "b/deeper/still/x.png"], key=lambda name: name.split("/")), {})


def test_what_is_left_out_is_counted_and_named(tmp_path):
    touch(tmp_path, "a.png", "._a.png", ".DS_Store", ".ipynb_checkpoints/a-checkpoint.png", "b.heic", "c.HEIC", "d")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path / "gone", tmp_path / "line3")
    images, counts = found(tmp_path)
    assert images == ["a.png"]
    assert counts == {
        "file with a hidden name": 1,
        "folder with a hidden name": 1,
        "file with the suffix .heic, which is not read": 2,
        "file without a suffix": 1,
        "link to something that does not exist": 1,
        "file that is not a regular one": 1,
    }
    search = ImageSearch()
    list(search.below(str(tmp_path)))
    message = search.skipped.message(tmp_path)
    assert message.startswith(f"left out of {tmp_path}: ")
    assert "2 files with the suffix .heic, which is not read (b.heic, c.HEIC)" in message
    assert "1 folder with a hidden name (.ipynb_checkpoints)" in message


def test_many_suffixes_do_not_fill_the_message(tmp_path):
    touch(tmp_path, *(f"x.{number}" for number in range(100)))
    _, counts = found(tmp_path)
    assert len(counts) <= 22
    assert sum(counts.values()) == 100


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "photos/line1/a.png", "other/line2/b.png", "other/c.png")
    photos = tmp_path / "photos"
    os.symlink(tmp_path / "other", photos / "other")
    os.symlink(photos / "line1", photos / "again")
    os.symlink(photos, tmp_path / "other" / "back")
    os.symlink(tmp_path, photos / "up")
    os.symlink(tmp_path / "other" / "line2", photos / "zz")
    os.symlink("self", photos / "self")
    os.symlink(tmp_path / "other" / "c.png", photos / "linked.png")
    images, counts = found(photos)
    assert images == ["line1/a.png", "linked.png", "other/c.png", "other/line2/b.png"]
    assert (
        counts
        == {
            "link to a folder that is searched anyway": 2,
            "link to a folder that holds this one": 2,
            "link to something that does not exist": 0,
        }
        | counts
    )
    assert sum(counts.values()) == 5


def test_a_link_to_a_part_does_not_hide_the_rest(tmp_path):
    touch(tmp_path, "other/line2/b.png", "other/c.png", "photos/x.png")
    os.symlink(tmp_path / "other" / "line2", tmp_path / "photos" / "a")
    os.symlink(tmp_path / "other", tmp_path / "photos" / "b")
    assert found(tmp_path / "photos") == (["a/b.png", "b/c.png", "x.png"], {"folder that a link led to before": 1})


def test_links_inside_a_dataset_are_followed_but_no_circles(tmp_path):
    touch(tmp_path, "pool/a.png", "one/b.png", "two/c.png")
    (tmp_path / "train").mkdir()
    os.symlink("../pool", tmp_path / "train" / "good")
    os.symlink("../two", tmp_path / "one" / "to")
    os.symlink("../one", tmp_path / "two" / "back")
    os.symlink("..", tmp_path / "pool" / "up")
    images, counts = found(tmp_path, each_once=False)
    assert set(images) == {
        "pool/a.png", "train/good/a.png", "one/b.png", "one/to/c.png", "two/c.png", "two/back/b.png",
    }  # fmt: skip
    assert counts == {"link to a folder that holds this one": 4}


def test_a_link_to_a_missing_image_is_found(tmp_path):
    """git-annex and DVC leave such links: leaving them out would shrink the dataset."""
    os.symlink(tmp_path / "annex" / "key", tmp_path / "a.png")
    assert found(tmp_path) == (["a.png"], {})


def test_a_folder_is_left_out(tmp_path):
    touch(tmp_path, "a.png", "scores/maps/a.png")
    os.symlink(tmp_path / "scores", tmp_path / "b")
    assert found(tmp_path, leave_out=[tmp_path / "scores"]) == (
        ["a.png"],
        {"folder that results are written to": 2},
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_rights_is_named(tmp_path):
    touch(tmp_path, "a.png", "closed/b.png")
    (tmp_path / "closed").chmod(0)
    assert found(tmp_path) == (["a.png"], {"folder without the right to read it": 1})
    (tmp_path / "closed").chmod(0o700)
