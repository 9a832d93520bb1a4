"""Files of a page of results: tables, writing, and comparison with the files in the repository."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastbgad.system.files import write_text


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return a Markdown table whose columns are aligned to the right, except those in `left`."""
    rule = ["---" if column in left else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def differences(files: Mapping[str, str], folder: Path, pictures: str) -> list[str]:
    """Return a line for every file in the folder that differs from the page.

    Args:
        files: contents of the page's files, by their paths below the folder.
        folder: the folder of the page.
        pictures: pattern of the page's pictures below the folder; others of this pattern are differences.
    """
    lines = []
    for name, content in files.items():
        path = folder / name
        if not path.exists():
            lines.append(f"{name} is missing")
            continue
        present = path.read_bytes().decode("utf-8", errors="replace")
        if present != content:
            pairs = difflib.unified_diff(present.split("\n"), content.split("\n"), lineterm="", n=0)
            first = next((line for line in pairs if re.match(r"[-+](?![-+]{2} )", line)), "")
            lines.append(f"{name} differs, first at: {first[:200]}")
    return lines + [f"{name} does not belong to the page" for name in _names(folder, pictures) if name not in files]


def write_files(files: Mapping[str, str], folder: Path, pictures: str) -> None:
    """Write the page, and remove pictures that it no longer has; arguments as of `differences`."""
    for name, content in files.items():
        write_text(folder / name, content)
    for name in _names(folder, pictures):
        if name not in files:
            (folder / name).unlink()


def _names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
