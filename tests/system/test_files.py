"""Atomic writing: whole files or none, whatever happens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Thread

import pytest

from fastbgad.errors import OutputError
from fastbgad.system.files import create_new, make_folder, sha256, write_bytes, write_json, write_text, write_with


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    write_text(target, "one")
    write_text(target, "two")
    assert target.read_text() == "two"
    assert leftovers(target.parent) == []
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_crash_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"before")

    def crash(path: Path) -> None:
        path.write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_with(target, crash)
    assert target.read_bytes() == b"before"
    assert leftovers(tmp_path) == []


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"before")

    def fill(_: Path) -> None:
        with open("/dev/full", "wb") as full:
            full.write(b"x" * 100_000)

    with pytest.raises(OutputError, match=r"a\.bin: No space left on device; free some space"):
        write_with(target, fill)
    assert target.read_bytes() == b"before"
    assert leftovers(tmp_path) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for act in (lambda: make_folder(tmp_path / "file" / "x"), lambda: write_text(tmp_path / "file" / "x" / "a", "")):
        with pytest.raises(OutputError, match="cannot create the folder"):
            act()


@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_creates_a_file(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr("os.link", no_links)
    path, made = tmp_path / "file", []
    threads = [Thread(target=lambda n=n: made.append((create_new(path, b"%d" % n), n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [n for won, n in made if won]
    assert len(winners) == 1
    assert path.read_bytes() == b"%d" % winners[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def no_links(*_: object) -> None:
    raise OSError(95, "Operation not supported")


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Text shows their bytes; JSON gives them back as they were."""
    name = os.fsdecode(b"k\xe4rn.png")
    target = tmp_path / os.fsdecode(b"r\xfcn") / name
    write_text(target, f"{name} ä")
    assert target.read_bytes() == "k\\xe4rn.png ä".encode()
    write_json(target, {"name": [name, "\ud800", "ä"]})
    assert json.loads(target.read_bytes().decode("ascii")) == {"name": [name, "\ud800", "ä"]}


def test_sha256(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
