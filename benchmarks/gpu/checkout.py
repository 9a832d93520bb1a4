"""The version of the code that a result is of, also where git is not installed."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

# What results depend on.
SOURCES = ("fastbgad", "kernels", "benchmarks/gpu", "tests")
SUFFIXES = {".py", ".json", ".h", ".cpp", ".toml"}


def checkout(root: Path) -> dict[str, Any]:
    """Return "commit" ("unknown" without a repository), "changed_files" (None where only git could tell), "source".

    "source" is a digest of the files that results depend on: it tells of two checkouts whether they are the same.
    """
    commit, changed = commit_of(root)
    return {"commit": commit, "changed_files": changed, "source": source_digest(root)}


def commit_of(root: Path) -> tuple[str, bool | None]:
    """Return the commit, "unknown" without a repository, and True if files differ from it, None without git."""
    try:
        commit = _git(root, "rev-parse", "--short", "HEAD")
        return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return _read_head(root) or "unknown", None


def source_digest(root: Path) -> str:
    """Return the first digits of the SHA-256 of the sources and their names."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and path.parent.name != "configs":  # tuning writes these
                digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _git(root: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _read_head(root: Path) -> str | None:
    """Return the commit by reading the repository's files."""
    folder = root / ".git"
    try:
        if folder.is_file():  # of a worktree
            folder = (root / folder.read_text().partition("gitdir:")[2].strip()).resolve()
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:7]
        name = head.removeprefix("ref: ")
        common = folder
        if (folder / "commondir").is_file():
            common = (folder / (folder / "commondir").read_text().strip()).resolve()
        if (common / name).is_file():
            return (common / name).read_text().strip()[:7]
        for entry in (common / "packed-refs").read_text().splitlines():
            if entry.endswith(f" {name}"):
                return entry[:7]
    except OSError:
        return None
    return None
