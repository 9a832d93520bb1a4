"""The contact sheet of a data set: one HTML page or one PNG, by the file's suffix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..render.html_page import css_color, render, require_jinja2
from ..render.plots import GROUND_TRUTH_COLOR
from ..render.thumbnails import jpeg_address
from ..system.files import write_text, write_with
from .sheet_content import SheetCategory
from .sheet_picture import draw_sheet

_TEMPLATE = "contact_sheet.html.jinja"
_MOST_SENTENCES = 20  # of each kind and category


def check_sheet_path(path: Path) -> None:
    """Raise an error, before anything is looked at, if a sheet cannot be written to a path.

    Raises:
        ConfigError: the suffix is neither .html nor .png.
        MissingDependencyError: a page was asked for and jinja2 is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in (".html", ".htm", ".png"):
        raise ConfigError(f"the contact sheet {path} has the suffix {path.suffix!r}; name it .html or .png")
    if suffix != ".png":
        require_jinja2()


def write_sheet(path: Path, title: str, categories: Sequence[SheetCategory]) -> None:
    """Write the contact sheet of categories.

    Raises:
        ConfigError, MissingDependencyError: see `check_sheet_path`.
        OutputError: the file cannot be written.
    """
    check_sheet_path(path)
    if path.suffix.lower() == ".png":
        picture = draw_sheet(title, categories)
        write_with(path, lambda temporary: picture.save(temporary, "PNG"))
        return
    page = render(
        __package__,
        _TEMPLATE,
        title=title,
        outline=css_color(GROUND_TRUTH_COLOR),
        categories=[_category(category) for category in categories],
    )
    write_text(path, page)


def _category(category: SheetCategory) -> dict[str, Any]:
    summary = category.summary
    return {
        "name": summary.name,
        "root": summary.root,
        "layout": f"{summary.title} (layout {summary.layout})" if summary.layout else "cannot be opened",
        "problems": _cut(summary.problems),
        "notes": _cut(summary.notes),
        "strips": [
            {
                "name": strip.name,
                "anomalous": strip.anomalous,
                "counts": strip.counts,
                "pictures": [
                    {
                        "name": picture.name,
                        "src": "" if picture.photo is None else jpeg_address(picture.photo),
                        "caption": picture.caption,
                        "marks": picture.marks,
                        "error": picture.error,
                    }
                    for picture in strip.pictures
                ],
            }
            for strip in category.strips
        ],
    }


def _cut(sentences: Sequence[str]) -> list[str]:
    shown = list(sentences[:_MOST_SENTENCES])
    left_out = len(sentences) - len(shown)
    return [*shown, f"and {left_out} more"] if left_out else shown
