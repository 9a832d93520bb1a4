"""Phrases that messages share: counts with nouns, time spans, lists that are cut, names nearly right or not UTF-8."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

_SURROGATE = re.compile("[\ud800-\udfff]")


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number of things, such as 1 cell or 2 cells; `plural` is for nouns that take more than an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Return a time span in the two units that matter, such as 2 h 5 min."""
    whole = round(seconds)
    for unit, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller} {smaller_name}"
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"


def printable(text: str) -> str:
    r"""Return text that every encoding of Unicode can hold: bytes of a file name that is not UTF-8 become \xe4.

    Python represents such bytes by lone surrogates (`os.fsdecode`); any other lone surrogate becomes \ud800.
    """
    return _SURROGATE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def indented(message: str) -> str:
    """Return a message of several lines as it stands in a list."""
    return message.replace("\n", "\n    ")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def choose(known: Iterable[str]) -> str:
    """Return the remedy for an unknown name: choose one of a, b, c."""
    return f"choose one of {', '.join(known)}"


def did_you_mean(name: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """Return the question "did you mean a? " with a space behind it, or nothing where no known name is close.

    Args:
        name: what was given.
        known: what could have been meant.
        most: names to suggest.
        cutoff: how similar a suggestion must be, as `difflib.get_close_matches` takes it.
    """
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {', '.join(close)}? " if close else ""


def listed(items: Sequence[str], most: int, separator: str = ", ", total: int | None = None) -> str:
    """Return the first items as a list: a, b, c, and 4 more.

    Args:
        items: to list, or at least the first of them.
        most: items that are shown.
        separator: between items, and before the number of those left out.
        total: number of all items, where `items` does not hold them all.
    """
    total = len(items) if total is None else total
    shown = separator.join(items[:most])
    left_out = total - min(most, len(items))
    return f"{shown}{separator}and {left_out} more" if left_out else shown


def bullets(items: Sequence[str], most: int = 20, total: int | None = None) -> str:
    """Return the first items as lines of their own, and a last line with the number of those left out.

    Args:
        items: to list, or at least the first of them.
        most: items that are shown.
        total: number of all items, where `items` does not hold them all.
    """
    lines = [f"  - {indented(item)}" for item in items[:most]]
    left_out = (len(items) if total is None else total) - len(lines)
    return "\n".join([*lines, f"  ... and {left_out} more"] if left_out else lines)
