"""The qualitative figure: input, ground truth, NFAD's map and BGAD's map of a few test images of every category."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ...config import METHOD_NAMES
from ...errors import DataError, FastBGADError
from ...render.plots import heat_overlay, mask_contour
from ...render.thumbnails import shrink_map, shrink_mask, thumbnail
from ...system.files import write_with
from ..plan import Cell, Plan, TablePlan
from .texts import DATASETS, row_text

FOLDER = "pictures"
"""Folder of the maps of cells in a run's folder, each file named after its cell's key."""
_METHODS = ("nfad", "bgad")
_ARRAYS = {"names": 1, "images": 4, "masks": 3, "maps": 3, "range": 1}

# The figure for papers: sides in pixels.
_SIDE, _GAP, _HEADING, _LETTERS = 192, 6, 26, 15
_MOST_ROWS = 12


class Panel(NamedTuple):
    """One picture of an example."""

    caption: str
    alt: str
    picture: NDArray[np.uint8] | None
    """uint8 [h, w, 3]; None where the method has no map of this image."""


@dataclass(frozen=True, eq=False)
class Example:
    """One test image with the maps of the methods."""

    dataset: str
    category: str
    name: str
    """Name of the image, with its defect type."""
    panels: tuple[Panel, ...]
    """Input, ground truth, and a map for NFAD and for BGAD."""

    @property
    def title(self) -> str:
        """Category and image, for readers."""
        return f"{DATASETS.get(self.dataset, self.dataset)}, {row_text(self.category)}: {self.name}"


def load_examples(folder: Path, plans: Iterable[Plan], per_category: int = 2) -> tuple[list[Example], list[str]]:
    """Return the examples of all categories with stored maps, and a sentence for every file that cannot be used.

    Args:
        folder: of the run; the maps are in its folder "pictures".
        plans: the tables among them name the cells whose maps are read.
        per_category: largest number of images of a category, of different defect types where there are several.
    """
    examples: list[Example] = []
    problems: list[str] = []
    for cells in _pairs(folder, plans):
        arrays: dict[str, Mapping[str, NDArray[Any]]] = {}
        for method, cell in cells.items():
            try:
                arrays[method] = _read(_path(folder, cell))
            except FastBGADError as error:
                problems.append(f"{FOLDER}/{cell.key}.npz is left out: {error}. Delete it and run its cell again.")
        any_cell = next(iter(cells.values()))
        try:
            examples += _examples(any_cell, arrays, per_category)
        except FastBGADError as error:
            problems.append(f"The maps of {any_cell.dataset} {any_cell.category} are left out: {error}.")
    return examples, problems


def _pairs(folder: Path, plans: Iterable[Plan]) -> Iterator[dict[str, Cell]]:
    """Yield for every category the NFAD and the BGAD cell to show, of the same test images where both have a file."""
    groups: dict[tuple[str, str], dict[Cell, dict[str, Cell]]] = {}
    tables = [plan for plan in plans if isinstance(plan, TablePlan)]
    for cell in dict.fromkeys(cell for plan in tables for cell in plan.cells):
        if cell.method in _METHODS and not cell.overrides and _path(folder, cell).exists():
            same_images = replace(cell, method=_METHODS[0])
            groups.setdefault((cell.dataset, cell.category), {}).setdefault(same_images, {})[cell.method] = cell
    for candidates in groups.values():
        # max keeps the first of equals, that of the first table.
        chosen = max(candidates.values(), key=len)
        yield {method: chosen[method] for method in _METHODS if method in chosen}


def _path(folder: Path, cell: Cell) -> Path:
    return folder / FOLDER / f"{cell.key}.npz"


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"it is no archive of {', '.join(_ARRAYS)} ({type(error).__name__})") from error
    sizes = {name: array.shape[:3] for name, array in arrays.items() if name in ("images", "masks", "maps")}
    if any(arrays[name].ndim != ndim for name, ndim in _ARRAYS.items()) or len(set(sizes.values())) > 1:
        raise DataError(f"its arrays do not belong together: {sizes}")
    if len(arrays["names"]) != len(arrays["images"]) or arrays["range"].shape != (2,):
        raise DataError("its names or its range do not fit its images")
    return arrays


def _examples(cell: Cell, arrays_of: Mapping[str, Mapping[str, NDArray[Any]]], most_images: int) -> Iterator[Example]:
    """Yield the examples of a category from the stored arrays of each method."""
    if not arrays_of:
        return
    first = next(iter(arrays_of.values()))
    masks = {str(name): mask for name, mask in zip(first["names"], first["masks"], strict=True)}
    images = {str(name): image for name, image in zip(first["names"], first["images"], strict=True)}
    indices = {method: {str(name): n for n, name in enumerate(arrays["names"])} for method, arrays in arrays_of.items()}
    for name in _choose(masks, most_images):
        photo = thumbnail(images[name], name)
        truth = mask_contour(photo, shrink_mask(masks[name], photo))
        panels = [Panel("Input", f"photograph {name}", photo)]
        panels.append(Panel("Ground truth", f"{name} with the true defect outlined", truth))
        for method in _METHODS:
            written = METHOD_NAMES[method]
            picture, caption = None, f"{written} map"
            if name in indices.get(method, {}):
                arrays = arrays_of[method]
                plane = shrink_map(arrays["maps"][indices[method][name]].astype(np.float32), photo)
                picture = heat_overlay(photo, plane, *(float(end) for end in arrays["range"]))
            panels.append(Panel(caption, f"anomaly map of {name} by {written}", picture))
        yield Example(cell.dataset, cell.category, name, tuple(panels))


def _choose(masks: Mapping[str, NDArray[np.bool_]], most: int) -> list[str]:
    """Return the names of anomalous images: one of every defect type in turn, in the file's order."""
    by_type: dict[str, list[str]] = {}
    for name, mask in masks.items():
        if mask.any():
            by_type.setdefault(name.rpartition("/")[0], []).append(name)
    turns = max(map(len, by_type.values()), default=0)
    queue = [members[turn] for turn in range(turns) for members in by_type.values() if turn < len(members)]
    return queue[:most]


def write_figure(path: Path, examples: Sequence[Example]) -> None:
    """Write the examples as one PNG, a row each; after twelve rows the next column starts.

    Raises:
        OutputError: the file cannot be written.
    """
    write_with(path, lambda temporary: figure_of(examples).save(temporary))


def figure_of(examples: Sequence[Example]) -> Image.Image:
    """Return the picture that `write_figure` writes, on white."""
    columns = -(-len(examples) // _MOST_ROWS)
    rows = -(-len(examples) // columns)
    panels = max(len(example.panels) for example in examples)
    column_width = panels * (_SIDE + _GAP) + 2 * _GAP
    row_height = _HEADING + _SIDE + _GAP
    paper = Image.new("RGB", (columns * column_width + _GAP, rows * row_height + _HEADING + _GAP), "white")
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(_LETTERS)
    for number, example in enumerate(examples):
        column, row = divmod(number, rows)
        left, top = column * column_width + 2 * _GAP, _HEADING + row * row_height
        draw.text((left, top + _HEADING / 2), example.title, "black", font, anchor="lm")
        for panel_number, panel in enumerate(example.panels):
            x, y = left + panel_number * (_SIDE + _GAP), top + _HEADING
            if row == 0:
                draw.text((x + _SIDE / 2, _HEADING / 2), panel.caption, "black", font, anchor="mm")
            if panel.picture is not None:
                picture = Image.fromarray(panel.picture)
                scale = _SIDE / max(picture.size)
                size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
                picture = picture.resize(size, Image.Resampling.LANCZOS)
                paper.paste(picture, (x + (_SIDE - size[0]) // 2, y + (_SIDE - size[1]) // 2))
    return paper
