"""The layout of Real-IAD: OK/ and NG/<type>/ with a folder per part, masks beside the images, and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..sample import GOOD, Sample
from .listing import HOLDOUT, Listing, TableEntry
from .tree import ImageFile

_OK, _NG = "OK", "NG"
# Where the file of a category lies relative to the folder of the dataset's images, or one above it.
_PLACES = (Path(), Path("realiad_jsons"), Path("realiad_jsons") / "realiad_jsons")


def list_real_iad(listing: Listing) -> None:
    """List a category of Real-IAD, divided as its JSON file says, or else with normal images held out."""
    table = _table(listing.root)
    if table is not None:
        _list_by_table(listing, table)
        return
    normals = listing.normals(_OK)
    listing.hold_out(normals)
    what = f"realiad_jsons/{listing.root.absolute().name}.json was found neither beside nor above {listing.root}"
    listing.note_holdout(len(listing.test), HOLDOUT, what)
    for defect, name in listing.types(_NG):
        folder = listing.tree.find(_NG, name)
        files = listing.images(_NG, name) if folder is None else folder.images()
        masks = {file.key: file for file in files if file.path.suffix.lower() == ".png"}
        images = listing.without_twins(file for file in files if file.path.suffix.lower() != ".png")
        listing.test += _beside(listing, images, masks, defect)


def _beside(listing: Listing, images: list[ImageFile], masks: Mapping[str, ImageFile], defect: str) -> list[Sample]:
    samples = []
    for image in images:
        mask = masks.get(image.key)
        if mask is None:
            listing.problems.append(f"{image.path} has no mask; add {image.path.with_suffix('.png')}")
        else:
            listing.use([mask])
            samples.append(listing.sample(image, mask.path, 1, defect))
    return samples


def _table(root: Path) -> Path | None:
    candidates = (
        base / place / f"{root.name}.json" for base in (root, *root.absolute().parents[:2]) for place in _PLACES
    )
    return next((path for path in candidates if path.is_file()), None)


def _list_by_table(listing: Listing, table: Path) -> None:
    files = {file.part: file for file in listing.tree.images()}
    for entry in _entries(table):
        listing.add_entry(entry, files)


def _entries(table: Path) -> Iterator[TableEntry]:
    """Yield the entries of a table; the paths in it are relative to the category.

    Raises:
        DataError: the file cannot be read, or is not of this form.
    """
    try:
        content: dict[str, Any] = json.loads(table.read_text(encoding="utf-8"))
        meta = content.get("meta", {})
        normal, prefix = meta.get("normal_class", _OK), str(meta.get("prefix", ""))
        for part in ("train", "test"):
            for number, entry in enumerate(content[part], start=1):
                image, mask = str(entry["image_path"]), str(entry.get("mask_path") or "")
                defect = GOOD if entry["anomaly_class"] == normal else str(entry["anomaly_class"])
                place = f"entry {number} of {part} in {table}"
                yield TableEntry(place, part, image.removeprefix(prefix), mask.removeprefix(prefix), defect)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{table} is not the JSON file of a category of Real-IAD ({reason}); copy it again") from error
