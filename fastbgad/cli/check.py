"""`fastbgad check`: what is in a data set, before a model is trained on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..data import list_categories, parse_size
from ..data.category import folders_without_category
from ..data.contact_sheet import check_sheet_path, write_sheet
from ..data.sheet_content import SheetCategory, Strip, sheet_strips
from ..data.summary import CategorySummary, CheckedCategory, MaskSummary, TypeSummary, coverage_text
from ..errors import ConfigError, DataError
from ..render import console
from ..wording import bullets, count, listed, printable
from .options import Check, FileOptions, Layout

_MOST_SENTENCES = 20  # of each kind and category
_NONE = "–"


@dataclass(frozen=True)
class CheckData:
    """Show what is in a data set: counts, sizes, masks, what is left out, and everything that is wrong.

    For example:

    fastbgad check mvtec

    fastbgad check mvtec --category screw --check full --sheet screw.html

    fastbgad check mvtec --json | jq '.categories[] | select(.problems != [])'

    The exit code is 2 if something must be mended before a training, else 0.
    """

    data: tyro.conf.Positional[Path]
    """Folder of the dataset or of one category."""
    category: str | None = None
    """Name of one category; all of them if left out."""
    layout: Layout = "auto"
    """How the folders are laid out."""
    check: Check = "quick"
    """full: decode every image and mask; quick: headers of the images, and masks; none: names alone."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width in pixels that a model would resize images to."""
    num_anomalies: int | None = None
    """How many anomalies would be known; None: 10, or half of them where that is fewer."""
    json: bool = False
    """Print the facts as JSON and nothing else; sizes are [height, width], coverages shares of 1."""
    sheet: Path | None = None
    """Write a contact sheet with the masks outlined: a page (.html) or a picture (.png)."""
    per_type: int = 6
    """Images of each type on the contact sheet."""
    files: Annotated[FileOptions, tyro.conf.arg(name="")] = field(default_factory=FileOptions)

    def run(self) -> int:
        """Look at every category and print what was found; return the exit code."""
        parse_size(self.image_size)
        if self.per_type < 1 or (self.num_anomalies or 0) < 0:
            raise ConfigError(
                f"per_type is {self.per_type} and num_anomalies {self.num_anomalies}; give at least 1 and 0"
            )
        if self.sheet is not None:
            check_sheet_path(self.sheet)
        names = list_categories(self.data, self.layout)
        # Of a name that is not there, or of no category at all, the survey says what is wrong.
        chosen = names if self.category is None and names else [self.category]
        looked_at = [self._look_at(name, name in names) for name in chosen]
        summaries = [summary for summary, _ in looked_at]
        others = folders_without_category(self.data, self.layout) if self.category is None else []
        self._print(summaries, others)
        if self.sheet is not None:
            sheets = [SheetCategory(summary, strips) for summary, strips in looked_at]
            write_sheet(self.sheet, f"Data of {self.data.resolve().name}", sheets)
            if not self.json:
                print(f"\ncontact sheet: {self.sheet}")
        return 2 if any(summary.problems for summary in summaries) else 0

    def _look_at(self, name: str | None, is_there: bool) -> tuple[CategorySummary, tuple[Strip, ...]]:
        """Return a category in numbers and, if a sheet is asked for, in pictures."""
        title = printable(name or self.data.name)
        try:
            with nullcontext() if self.json else console.check_bar(title) as on_files:
                checked = CheckedCategory(
                    self.data, name, self.image_size, self.layout, self.check, self.files, on_files
                )
        except DataError as error:
            if not is_there:
                raise
            return CategorySummary(str(name), str(self.data), problems=(str(error),)), ()
        summary = checked.summary(self.num_anomalies)
        return summary, () if self.sheet is None else sheet_strips(checked, summary, self.per_type)

    def _print(self, summaries: Sequence[CategorySummary], others: Sequence[str]) -> None:
        if self.json:
            facts: dict[str, Any] = {
                "data": str(self.data),
                "check": self.check,
                "image_size": self.image_size,
                "categories": [summary.as_dict() for summary in summaries],
                "not_categories": list(others),
            }
            print(json.dumps(facts, indent=2, allow_nan=False))
            return
        if len(summaries) > 1:
            print_overview(summaries)
        for number, summary in enumerate(summaries):
            if number or len(summaries) > 1:
                print()
            print_category(summary, self.image_size)
        if others:
            print(
                f"\nnot looked at, since their folders have no known layout: {listed(others, _MOST_SENTENCES)} "
                f"(in {self.data})"
            )


def print_overview(summaries: Sequence[CategorySummary]) -> None:
    """Print a line for each category."""
    print(count(len(summaries), "category", "categories"))
    rows = []
    for summary in summaries:
        normal = [kind for kind in summary.types if kind.masks is None]
        anomalous = [kind for kind in summary.types if kind.masks is not None]
        rows.append(
            (
                summary.name,
                summary.layout or _NONE,
                sum(kind.training for kind in normal),
                sum(kind.test for kind in normal),
                sum(kind.training + kind.test for kind in anomalous),
                len(anomalous),
                len(summary.problems) or _NONE,
                len(summary.notes) or _NONE,
            )
        )
    head = ("category", "layout", "train", "test good", "anomalous", "types", "problems", "notes")
    console.print_columns(rows, head, right=range(2, 8))


def print_category(summary: CategorySummary, image_size: tuple[int, int]) -> None:
    """Print everything about a category."""
    layout = f"{summary.title} (layout {summary.layout})" if summary.layout else "cannot be opened"
    print(f"{summary.name}: {layout}, {summary.root}")
    if summary.types:
        head = ("type", "train", "test", "masks", "mask covers, in %\nmin · median · max", "remarks")
        rows = [_type_row(kind) for kind in summary.types]
        # Columns at the end that would be empty are left out.
        shown = max(number for row in rows for number, cell in enumerate(row, 1) if cell != "")
        console.print_columns([row[:shown] for row in rows], head[:shown], right=(1, 2, 3))
        print()
        console.print_columns([row for row in _facts(summary, image_size) if row[1]])
    for title, sentences in (
        ("notes", summary.notes),
        ("left out", summary.skipped_sentences),
        ("problems", summary.problems),
    ):
        if sentences:
            print(f"  {title}:\n{bullets(sentences, _MOST_SENTENCES)}")
    if not summary.problems:
        print("  no problems, but look at the notes" if summary.notes else "  nothing is wrong")


def _type_row(kind: TypeSummary) -> tuple[object, ...]:
    masks = kind.masks
    if masks is None:
        return kind.name, kind.training, kind.test, _NONE, "", ""
    covers = ""
    if masks.least is not None and masks.median is not None and masks.most is not None:
        shares = dict.fromkeys(map(coverage_text, (masks.least, masks.median, masks.most)))
        covers = " · ".join(shares)
    return kind.name, kind.training or _NONE, kind.test, masks.number, covers, ", ".join(_remarks(masks))


def _remarks(masks: MaskSummary) -> Iterator[str]:
    """Yield what is unusual about the masks of a type, what matters most first."""
    for number, text in (
        (masks.unreadable, "unreadable"),
        (masks.empty, "empty"),
        (masks.whole, "whole image"),
        (masks.inverted, "inverted?"),
        (masks.vanished, "vanished"),
        (masks.without, "without mask"),
        (masks.soft_edges, "soft edges"),
        (masks.alpha, "alpha"),
    ):
        if number:
            yield f"{number} {text}"


def _facts(summary: CategorySummary, image_size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Yield the lines below the table: a name, and a text that may be empty."""
    yield "sizes", _sizes(summary)
    yield "values", _values(summary)
    if summary.mask_threshold is not None:
        share = summary.mask_threshold
        yield "masks", f"above {share:g} of the full range" if share else "every value but 0 is anomalous"
    yield f"at {_by(image_size)}", _losses(summary, image_size)
    split = summary.split
    if split is not None and summary.types:
        known = count(split.known, "known anomaly", "known anomalies")
        if split.known and not any(kind.masks.number for kind in summary.types if kind.masks is not None):
            known += " (of no use without masks: --method nfad)"
        yield (
            "would be used",
            f"training: {split.normals} normal, {known}; test: {split.tested_normal} normal, "
            f"{split.tested_anomalous} anomalous",
        )


def _sizes(summary: CategorySummary) -> str:
    sizes = summary.sizes
    if sizes is None:
        return ""
    if sizes.different == 1:
        return f"all {_by(sizes.most_common)} (height x width)"
    most = f"most common {_by(sizes.most_common)} ({count(sizes.most_common_images, 'image')})"
    ranges = f"heights {sizes.heights[0]} to {sizes.heights[1]}, widths {sizes.widths[0]} to {sizes.widths[1]}"
    return f"{sizes.different} different: {ranges}; {most}"


def _values(summary: CategorySummary) -> str:
    depth = f"of 16 bits {summary.bit_depth} are used" if summary.bit_depth is not None else ""
    stored = [f"{bits} bits" if bits < 32 else "floating point" for bits, _ in summary.bits]
    if len(stored) > 1:
        stored = [f"{text} in {count(images, 'image')}" for text, (_, images) in zip(stored, summary.bits, strict=True)]
    return "; ".join(filter(None, (listed(stored, 3), depth)))


def _losses(summary: CategorySummary, image_size: tuple[int, int]) -> str:
    """Return what the model's image size loses."""
    parts, vanished = [], summary.vanished
    if summary.sizes is not None:
        largest = summary.sizes.heights[1] / image_size[0], summary.sizes.widths[1] / image_size[1]
        if max(largest) > 1:
            parts.append(f"images are reduced up to {max(largest):.2g} times")
    if vanished is not None and not vanished.masks:
        parts.append("every mask keeps at least one pixel" if parts else "every mask is kept")
    elif vanished is not None:
        parts.append(f"{vanished.masks} of {count(vanished.of, 'mask')} vanished: no pixel is left")
        size = vanished.smallest_size
        keeps = "no size up to their own keeps all" if size is None else f"--image-size {size[0]} {size[1]} keeps all"
        parts.append(keeps)
    return "; ".join(parts)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
