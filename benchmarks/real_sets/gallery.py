"""Pictures of test images with the map of every contender, as a page that stays beside the results.

The data sets' licences forbid commercial use, so neither their images nor maps of them belong into the repository.
"""

from __future__ import annotations

import html
import re
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastbgad.data import Split
from fastbgad.render.plots import heat_overlay, mask_contour
from fastbgad.render.thumbnails import jpeg_address, shrink_map, shrink_mask, thumbnail
from fastbgad.system.files import write_text, write_with

from .bench import Bench
from .grid import CONVERGENCE, METHODS, Run

_PICTURED_SEED, _PICTURES = 0, 3
_STYLE = """body{font:15px/1.5 sans-serif;margin:2rem;color:#1b2027;background:#fff}
figure{display:inline-block;margin:0 .6rem 1rem 0;width:160px;vertical-align:top}img{width:160px}
figcaption{font-size:12px;color:#3c444d}h3{margin:.6rem 0;font-size:14px}"""


def keep_pictures(out: Path, run: Run, bench: Bench, split: Split, maps: Tensor) -> None:
    """Keep the maps of the first test image of up to three defect types beside the result of the first seed."""
    if run.seed != _PICTURED_SEED or run.setting == CONVERGENCE:
        return
    first: dict[str, int] = {}
    for place, sample in enumerate(split.test):
        if sample.label:
            first.setdefault(sample.defect, place)
    places = list(first.values())[:_PICTURES]
    names = np.array([split.test[place].name for place in places])
    images = _images_path(out, run.category, run.size)
    if not images.exists():
        pixels, masks = bench.images_and_masks(split, places)
        _save(images, names=names, images=pixels, masks=masks)
    ends = np.array([maps.flatten()[:: max(1, maps.numel() // 1_000_000)].median(), maps.max()], np.float32)
    _save(_maps_path(out, run), names=names, maps=maps[places].numpy().astype(np.float32), range=ends)


def write_gallery(out: Path, runs: list[Run]) -> tuple[Path, list[str]]:
    """Write page.html into the folder of the results; also return a line for every file that cannot be used."""
    problems: list[str] = []
    shown: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        if run.seed == _PICTURED_SEED and _maps_path(out, run).exists():
            shown.setdefault((run.category, run.size), []).append(run)
    parts = []
    for (category, size), members in sorted(shown.items()):
        photos = _load(_images_path(out, category, size), ("names", "images", "masks"), problems)
        maps = [(run, _load(_maps_path(out, run), ("names", "maps", "range"), problems)) for run in members]
        if photos is not None:
            parts.append(_section(category, size, photos, [(run, kept) for run, kept in maps if kept is not None]))
    path = out / "page.html"
    body = "\n".join(parts) or "<p>No pictures were kept yet.</p>"
    title = "Anomaly maps on real photographs"
    write_text(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>The pictures belong to data sets under non-commercial licences: do not publish this page. "
        "Every method's colors run from the median of its scores on the category to the largest.</p>"
        f"\n{body}\n</html>\n",
    )
    return path, problems


def _section(category: str, size: int, photos: dict[str, Any], maps: list[tuple[Run, dict[str, Any]]]) -> str:
    lines = [f"<h2>{html.escape(category)}, {size} pixels</h2>"]
    for name, image, mask in zip(photos["names"], photos["images"], photos["masks"], strict=True):
        photo = thumbnail(image, str(name))
        panels = [("input", photo), ("ground truth", mask_contour(photo, shrink_mask(mask, photo)))]
        for run, kept in maps:
            place = {str(each): number for number, each in enumerate(kept["names"])}.get(str(name))
            if place is not None:
                plane = shrink_map(kept["maps"][place], photo)
                low, high = map(float, kept["range"])
                caption = f"{METHODS[run.method]}, {run.features}, {run.setting}"
                panels.append((caption, heat_overlay(photo, plane, low, high)))
        figures = (
            f'<figure><img src="{jpeg_address(picture)}" alt="{html.escape(caption)}"><figcaption>'
            f"{html.escape(caption)}</figcaption></figure>"
            for caption, picture in panels
        )
        lines.append(f"<h3>{html.escape(str(name))}</h3>{''.join(figures)}")
    return "\n".join(lines)


def _images_path(out: Path, category: str, size: int) -> Path:
    return out / category / f"pictures-{size}.npz"


def _maps_path(out: Path, run: Run) -> Path:
    return out / re.sub(r"\.json$", ".npz", str(run.path))


def _save(path: Path, **arrays: Any) -> None:
    write_with(path, partial(np.savez_compressed, **arrays))


def _load(path: Path, names: tuple[str, ...], problems: list[str]) -> dict[str, Any] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        problems.append(f"{path} holds no pictures ({type(error).__name__}); delete it and its result to redo them")
        return None
