"""The version of the code is known with git, by reading the repository's files, and by a digest."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu import checkout


def git(root: Path, *command: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *command], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "kernels" / "configs").mkdir(parents=True)
    (tmp_path / "kernels" / "a.py").write_text("a = 1\n")
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(root: Path, *command: str) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(checkout, "_git", missing)


def test_with_git(repository: Path) -> None:
    found = checkout.checkout(repository)
    assert found["commit"] == git(repository, "rev-parse", "--short", "HEAD")
    assert found["changed_files"] is False
    (repository / "kernels" / "a.py").write_text("a = 2\n")
    changed = checkout.checkout(repository)
    assert changed["changed_files"] is True
    assert changed["source"] != found["source"]


def test_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a branch, with packed references, detached, and in a worktree."""
    commit = git(repository, "rev-parse", "HEAD")[:7]
    git(repository, "worktree", "add", "-q", "--detach", "tree")
    without_git(monkeypatch)
    assert checkout.checkout(repository)["commit"] == commit
    assert checkout.checkout(repository)["changed_files"] is None
    assert checkout.checkout(repository / "tree")["commit"] == commit
    git(repository, "pack-refs", "--all")
    assert not (repository / ".git" / "refs" / "heads" / "main").exists()
    assert checkout.checkout(repository)["commit"] == commit
    git(repository, "checkout", "-q", "--detach")
    assert checkout.checkout(repository)["commit"] == commit


def test_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_git(monkeypatch)
    assert checkout.checkout(tmp_path)["commit"] == "unknown"


def test_tuned_tiles_are_no_other_source(repository: Path) -> None:
    """Tuning writes them in the middle of a run."""
    before = checkout.source_digest(repository)
    (repository / "kernels" / "configs" / "gpu.json").write_text("{}")
    assert checkout.source_digest(repository) == before
