from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from fastbgad.data.files import ImageSearch
from fastbgad.data.layouts.tree import composed, read_tree


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_one_search_gives_all_folders(tmp_path):
    touch(tmp_path, "Train/good/a.png", "Train/good/deep/er/b.png", "x.png", "Train/good/.c.png")
    search = ImageSearch()
    tree = read_tree(tmp_path, search)
    assert tree.files == ["x.png"]
    good = tree.find("train", "GOOD")
    assert good is not None
    assert [image.part for image in good.images()] == ["a.png", "deep/er/b.png"]
    assert [image.key for image in good.images()] == ["a", "deep/er/b"]
    assert good.images()[1].path == tmp_path / "Train/good/deep/er/b.png"
    assert tree.find("train", "bad") is None
    assert len(tree.images()) == 3
    assert search.skipped.counts == {"file with a hidden name": 1}


def test_the_exact_name_wins_and_two_others_are_ambiguous(tmp_path):
    touch(tmp_path, "Good/a.png", "good/b.png", "BAD/c.png", "Bad/d.png")
    tree = read_tree(tmp_path, ImageSearch())
    assert [image.part for image in tree.find("good").images()] == ["b.png"]
    assert tree.find("bad") is None


def test_composed_and_decomposed_names_are_equal(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "prüf") for form in ("NFC", "NFD"))
    assert nfc != nfd
    touch(tmp_path, f"{nfd}/{nfd}.png")
    folder = read_tree(tmp_path, ImageSearch()).find(nfc)
    assert folder is not None
    assert (folder.name, folder.images()[0].key) == (nfc, nfc)


def test_names_that_are_not_utf_8(tmp_path):
    path = os.fsencode(tmp_path) + b"/k\xe4rn"
    os.mkdir(path)
    with open(path + b"/\xff.png", "wb"):
        pass
    folder = read_tree(tmp_path, ImageSearch()).find(os.fsdecode(b"k\xe4rn"))
    assert os.fsencode(folder.images()[0].path).endswith(b"/k\xe4rn/\xff.png")
    assert composed(os.fsdecode(b"k\xe4rn")) == os.fsdecode(b"k\xe4rn")
