"""The carried compile cache: found from another place, described, and rid of what nothing asked for."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path

import pytest

from benchmarks.gpu import carried


def entry(cache: Path, digest: str, paths: str) -> Path:
    """An entry as Triton writes it, whose group names files below `paths`."""
    name = base64.b32encode(bytes.fromhex(digest)).decode().rstrip("=")
    folder = cache / name
    folder.mkdir(parents=True)
    files = ("kernel.json", "kernel.cubin", "kernel.source")
    for file in files:
        (folder / file).write_text("{}")
    children = {file: f"{paths}/{name}/{file}" for file in files}
    (folder / "__grp__kernel.json").write_text(json.dumps({"child_paths": children}))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(carried, "FOLDER", tmp_path)
    monkeypatch.setattr(carried, "ARCHIVE", tmp_path / "kernels.tar.xz")
    monkeypatch.setattr(carried, "CACHE", tmp_path / "triton-cache")
    monkeypatch.setattr(carried, "WHEELS", tmp_path / "wheels")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    return tmp_path / "triton-cache"


def test_nothing_is_carried(cache: Path) -> None:
    assert carried.environment() == {}
    assert carried.describe() == {"kernels": 0}


def test_triton_finds_the_files_where_they_are_now(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton writes whole paths into its cache; they are those of the machine that compiled."""
    pytest.importorskip("triton")
    from triton.runtime.cache import get_cache_manager

    digest = "ab" * 32
    folder = entry(cache, digest, "/somewhere/else")
    carried.pack()
    shutil.rmtree(cache)
    environment = carried.environment()
    assert environment["TRITON_CACHE_DIR"] == str(cache)
    monkeypatch.setenv("TRITON_CACHE_DIR", environment["TRITON_CACHE_DIR"])
    group = get_cache_manager(digest).get_group("kernel.json")
    assert group == {name: str(folder / name) for name in ("kernel.json", "kernel.cubin")}
    assert not (folder / "kernel.source").exists()  # half of the bytes, and nobody reads it
    assert carried.describe()["kernels"] == 1
    assert carried.relocate(cache) == 1  # once more changes nothing


def test_a_damaged_archive_is_named(cache: Path) -> None:
    entry(cache, "ab" * 32, str(cache))
    carried.pack()
    archive = carried.ARCHIVE
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(carried.CarriedError, match=r"kernels\.tar\.xz cannot be unpacked .* make gpu-carry"):
        carried.environment()


def test_wheels_are_imported_as_they_are(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = cache.parent / "wheels"
    wheels.mkdir()
    (wheels / "freia-0.2-py3-none-any.whl").write_text("")
    monkeypatch.setenv("PYTHONPATH", "before")
    assert carried.environment()["PYTHONPATH"] == f"{wheels / 'freia-0.2-py3-none-any.whl'}{os.pathsep}before"


def test_what_nothing_asked_for_is_dropped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, unused = entry(cache, "ab" * 32, str(cache)), entry(cache, "cd" * 32, str(cache))
    for folder in (used, unused):
        os.utime(folder, (1000, 1000))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    carried.mark_used("ab" * 32)
    carried.mark_used("ef" * 32)  # not in this cache
    assert carried.drop_unused(2000) == 1
    assert used.exists()
    assert not unused.exists()
