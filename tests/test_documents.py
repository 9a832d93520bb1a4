"""What documents and docstrings refer to exists: files, modules and their names, targets of make."""

from __future__ import annotations

import importlib
import re

import pytest

from tests import ROOT

# Of the repository; of what a run writes, or of a placeholder, nothing is said.
_PATH = re.compile(
    r"(?<![\w/.<{$-])(?:fastbgad|kernels|tests|benchmarks|examples)/[\w./-]*\w\.(?:py|toml|json|md|h|cpp|csv)\b"
)
_DOTTED = re.compile(r"`(fastbgad(?:\.(?!json\b)\w+)+)")
_PLACEHOLDERS = ("/norm", "_norm.", "_X.", "/X.", "test_some")


def texts() -> dict[str, str]:
    """Return the text of every document and module, by its path."""
    paths = [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.py")]
    for folder in ("fastbgad", "kernels", "benchmarks", "tests"):
        paths += (ROOT / folder).rglob("*.py")
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(paths)}


TEXTS = texts()


def test_files_exist() -> None:
    missing = [
        f"{name}: {path}"
        for name, text in TEXTS.items()
        for path in _PATH.findall(text)
        if not any(word in path for word in _PLACEHOLDERS)
        and not (ROOT / path).exists()
        and not (ROOT / "tests" / path).exists()  # files of tests are named below their folder
    ]
    assert not missing, "\n".join(missing)


def resolves(dotted: str) -> bool:
    """Return whether a dotted name is a module, or an attribute of one at any depth."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                break
            found = getattr(found, part)
        else:
            return True
    return False


def test_names_exist() -> None:
    names = {(name, dotted) for name, text in TEXTS.items() for dotted in _DOTTED.findall(text)}
    wrong = sorted(f"{name}: {dotted}" for name, dotted in names if not resolves(dotted))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_targets_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", TEXTS[document], re.MULTILINE))
    assert named
    assert not [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)]
