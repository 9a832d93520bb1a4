"""The layout of VisA: Data/Images/Normal, Data/Images/Anomaly, Data/Masks/Anomaly, and a table that divides them."""

from __future__ import annotations

import csv
from pathlib import Path

from ...errors import DataError
from ..sample import GOOD
from .listing import HOLDOUT, Listing, TableEntry

TABLE = Path("split_csv") / "1cls.csv"
"""The table of the one-class protocol, in the folder of the dataset."""

_COLUMNS = ("object", "split", "label", "image", "mask")
_IMAGES, _MASKS = ("Data", "Images"), ("Data", "Masks", "Anomaly")
_ANOMALY = "anomaly"


def list_visa(listing: Listing) -> None:
    """List a category of VisA. Every value of its masks but 0 is anomalous: they tell the kind of defect."""
    table = listing.root.absolute().parent / TABLE
    if table.is_file():
        _list_by_table(listing, table)
        return
    normals = listing.normals(*_IMAGES, "Normal")
    listing.hold_out(normals)
    listing.note_holdout(len(listing.test), HOLDOUT, f"there is no {table}")
    has_masks = listing.tree.find(*_MASKS) is not None
    listing.test += listing.anomalies((*_IMAGES, "Anomaly"), _MASKS if has_masks else None, _ANOMALY)
    if not has_masks:
        listing.note_missing_masks(listing.root.joinpath(*_MASKS))


def _list_by_table(listing: Listing, table: Path) -> None:
    files = {file.part: file for file in listing.tree.images()}
    category = listing.root.absolute().name
    rows = _rows(table, category)
    if not rows:
        listing.problems.append(f"{table} names no image of {category}; check the name of the folder")
    for number, row in rows:
        image, mask = (row[name].removeprefix(f"{category}/") for name in ("image", "mask"))
        defect = GOOD if row["label"].casefold() == "normal" else _ANOMALY
        entry = TableEntry(f"line {number} of {table}", row["split"], image, mask, defect)
        listing.add_entry(entry, files, parts_in_names=False)


def _rows(table: Path, category: str) -> list[tuple[int, dict[str, str]]]:
    """Return the lines of a category with their numbers.

    Raises:
        DataError: the table cannot be read, or has other columns.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or not set(_COLUMNS) <= set(reader.fieldnames):
                raise DataError(
                    f"{table} has the columns {', '.join(reader.fieldnames or ['none'])}; "
                    f"it should have {', '.join(_COLUMNS)}"
                )
            rows = [(reader.line_num, {name: row[name] or "" for name in _COLUMNS}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {table} ({error}); copy it again") from error
    return [(number, row) for number, row in rows if row["object"] == category]
