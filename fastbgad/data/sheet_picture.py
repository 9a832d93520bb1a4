"""The contact sheet as one picture, drawn by pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..wording import count, printable
from .sheet_content import Picture, SheetCategory, Strip

_SIDE, _GAP, _MARGIN, _ACROSS = 180, 14, 28, 6
_LINE = 17  # height of a line of small text
_WIDTH = 2 * _MARGIN + _ACROSS * _SIDE + (_ACROSS - 1) * _GAP
_PAPER, _INK, _SOFT, _SUSPICIOUS, _EMPTY = "#fbfbf9", "#1b2027", "#5c6672", "#d1376b", "#e2e4e3"


def draw_sheet(title: str, categories: Sequence[SheetCategory]) -> Image.Image:
    """Return the sheet of categories, as high as they need."""
    # Drawn twice: the first time only to learn the height.
    height = _Pen(Image.new("RGB", (_WIDTH, 1))).sheet(title, categories)
    sheet = Image.new("RGB", (_WIDTH, height), _PAPER)
    _Pen(sheet).sheet(title, categories)
    return sheet


class _Pen:
    """Draws from the top to the bottom of a picture; what lies outside is lost."""

    def __init__(self, target: Image.Image) -> None:
        self.target = target
        self.draw = ImageDraw.Draw(target)
        self.y = _MARGIN
        self.fonts: dict[int, Any] = {}

    def sheet(self, title: str, categories: Sequence[SheetCategory]) -> int:
        """Draw everything; return the height that it takes."""
        self.text(_MARGIN, title, 26, _INK)
        self.y += 46
        for category in categories:
            self.category(category)
        return self.y + _MARGIN

    def category(self, category: SheetCategory) -> None:
        """Draw the heading of a category and its strips."""
        summary = category.summary
        self.draw.line((_MARGIN, self.y, _WIDTH - _MARGIN, self.y), _EMPTY)
        self.y += 14
        self.text(_MARGIN, summary.name, 20, _INK)
        self.y += 28
        layout = f"{summary.title} (layout {summary.layout})" if summary.layout else "cannot be opened"
        self.text(_MARGIN, f"{layout}, {summary.root}", 12, _SOFT)
        self.y += _LINE
        if summary.problems:
            first = summary.problems[0].splitlines()[0]
            self.text(_MARGIN, f"{count(len(summary.problems), 'problem')}: {first}", 12, _SUSPICIOUS)
            self.y += _LINE
        self.y += 12
        for strip in category.strips:
            self.strip(strip)

    def strip(self, strip: Strip) -> None:
        """Draw the pictures of a type, as many rows as they need."""
        self.text(_MARGIN, f"{strip.name}: {strip.counts}", 14, _INK)
        self.y += 24
        for start in range(0, len(strip.pictures), _ACROSS):
            row = strip.pictures[start : start + _ACROSS]
            for number, picture in enumerate(row):
                self.picture(_MARGIN + number * (_SIDE + _GAP), picture)
            lines = 1 + max(len(picture.marks) for picture in row)
            self.y += _SIDE + 6 + lines * _LINE + 10
        self.y += 8

    def picture(self, x: int, picture: Picture) -> None:
        """Draw a picture in a square, its name, what its mask covers, and what is suspicious."""
        box = (x, self.y, x + _SIDE - 1, self.y + _SIDE - 1)
        self.draw.rectangle(box, _EMPTY)
        if picture.photo is None:
            self.error(x + 8, picture.error)
        else:
            photo = Image.fromarray(picture.photo)
            # Small ones are enlarged as well, so that their masks can be seen.
            scale = _SIDE / max(photo.size)
            photo = photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))))
            self.target.paste(photo, (x + (_SIDE - photo.width) // 2, self.y + (_SIDE - photo.height) // 2))
        if picture.marks:
            self.draw.rectangle(box, outline=_SUSPICIOUS, width=3)
        above = self.y
        self.y += _SIDE + 6
        reserved = self.font(12).getlength(picture.caption) + 8 if picture.caption else 0
        self.text(x, picture.name, 12, _SOFT, _SIDE - reserved)
        if picture.caption:
            self.text(x + _SIDE - reserved + 8, picture.caption, 12, _INK)
        for mark in picture.marks:
            self.y += _LINE
            self.text(x, mark, 12, _SUSPICIOUS, _SIDE)
        self.y = above

    def error(self, x: int, message: str) -> None:
        """Draw why a picture is missing into its square."""
        above, rest = self.y, printable(message)
        self.y += 8
        while rest and self.y < above + _SIDE - _LINE:
            length = next((n for n in range(len(rest), 1, -1) if self.font(11).getlength(rest[:n]) <= _SIDE - 16), 1)
            self.text(x, rest[:length], 11, _SOFT)
            rest = rest[length:]
            self.y += _LINE
        self.y = above

    def text(self, x: float, text: str, size: int, color: str, width: float = _WIDTH - 2 * _MARGIN) -> None:
        """Draw one line of text, cut to a width."""
        text, font = printable(text), self.font(size)
        if font.getlength(text) > width:
            while text and font.getlength(text + "…") > width:
                text = text[:-1]
            text += "…"
        self.draw.text((x, self.y), text, color, font)

    def font(self, size: int) -> Any:
        """Return the font that comes with pillow."""
        if size not in self.fonts:
            self.fonts[size] = ImageFont.load_default(size)
        return self.fonts[size]
