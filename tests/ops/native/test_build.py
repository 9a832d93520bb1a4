"""Compiling at first use: kept for the user, whole or not at all, and without a compiler nothing breaks."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbgad.errors import BackendError
from fastbgad.flow_spec import FlowSpec
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import PositionalRows
from fastbgad.ops.native import build as native_build

# Compiled without optimisation, which takes less than a second.
QUICK_FLAGS = ("-std=c++17", "-O0", "-fPIC", "-shared")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, which does not exist yet, and a process that has not looked for a compiler yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native_build, "FLAGS", QUICK_FLAGS)
    monkeypatch.setattr(native_build, "_outcome", native_build._Outcome())
    return tmp_path / "cache" / "fastbgad"


@pytest.fixture
def compiler() -> str:
    try:
        return native_build.find_compiler()
    except BackendError as error:
        pytest.skip(str(error))


def require_fallback(reason: str) -> None:
    """An explicit call raises with the reason, which is remembered; "auto" works."""
    flow, x, positions = ConditionalFlow(FlowSpec(8, coupling_layers=1)), torch.randn(12, 8), PositionalRows(3, 4)
    for _ in range(2):
        with pytest.raises(BackendError, match=f'impl="native": .*{reason}.*; use impl="torch" or "auto"'):
            flow(x, positions, impl="native")
    found = flow(x, positions).log_likelihood
    assert torch.equal(found, flow(x, positions, impl="torch").log_likelihood)
    found.sum().backward()


@pytest.mark.usefixtures("cache")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    require_fallback("there is no C\\+\\+ compiler")
    monkeypatch.setenv("CXX", "no-such-compiler")
    native_build.forget()
    require_fallback("CXX names the C\\+\\+ compiler no-such-compiler, which is not installed")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'flow.cpp:1: error: out of memory' >&2; exit 1", "failed: flow.cpp:1: error: out of memory"),
        ('[ "$1" = --version ] || exit 3', "failed: status 3"),
        ('[ "$1" = --version ] || sleep 5', "did not finish within"),
        # makes nothing, or nothing that can be loaded
        ('[ "$1" = --version ] || exit 0', "cannot be loaded"),
    ],
)
def test_broken_compiler(
    script: str, reason: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(native_build, "LONGEST_BUILD", 0.3)
    require_fallback(reason)
    assert not list(cache.glob(".*"))


def test_cache_folder_that_cannot_be_made(cache: Path, compiler: str) -> None:
    cache.parent.write_text("a file where the folder should be")
    require_fallback("cannot create the folder")


def test_kept_apart(cache: Path, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native_build.library()
    (target,) = cache.iterdir()
    made = target.stat().st_mtime_ns
    native_build.forget()
    native_build.library()
    assert target.stat().st_mtime_ns == made
    # others do not mix with it
    monkeypatch.setattr(native_build, "FLAGS", (*QUICK_FLAGS, "-DOTHER"))
    native_build.forget()
    native_build.library()
    assert len(list(cache.iterdir())) == 2


def test_what_cannot_be_loaded_is_made_anew(cache: Path, compiler: str) -> None:
    target = native_build._target(compiler)
    cache.mkdir(parents=True)
    target.write_bytes(b"not a library")
    native_build.library()
    assert list(cache.iterdir()) == [target]
    assert target.stat().st_size > 1000


def test_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert native_build.cache_folder() == Path.home() / ".cache" / "fastbgad"


def test_two_processes_at_once(cache: Path, compiler: str) -> None:
    script = f"""
from fastbgad.ops.native import build as native_build
native_build.FLAGS = {QUICK_FLAGS!r}
print(native_build.library().flow_sizes is not None)
"""
    runs = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        assert run.communicate()[0] == "True\n"
        assert run.returncode == 0
    (target,) = cache.iterdir()
    assert target.suffix == ".so"


def test_import_builds_nothing(cache: Path) -> None:
    script = "import fastbgad, fastbgad.ops.flow.compiled, fastbgad.ops.native.build as b; print(b._outcome.library)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "None\n"
    assert not cache.exists()
