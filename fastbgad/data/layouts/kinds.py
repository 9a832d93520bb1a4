"""The layouts that are known: how each is recognized, and how its images are listed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from .kolektor import list_kolektor, list_kolektor2
from .listing import Listing
from .plain import FolderLayout, list_folder
from .real_iad import list_real_iad
from .train_test import list_btad, list_loco, list_mvtec, list_mvtec_3d, list_mvtec_ad_2
from .visa import list_visa

Layout: TypeAlias = Literal[
    "auto", "mvtec", "mvtec_ad_2", "loco", "mvtec_3d", "btad", "visa", "kolektor", "kolektor2", "real_iad", "folder"
]


class Kind(NamedTuple):
    """A layout.

    Attributes:
        title: name of the dataset that has it.
        folders: names of folders of a category, by which it is recognized if it is asked for: all must be there.
        list: collects the samples of a category.
        recognizes: tells it from others with these folders.
        every_value: every value of a mask but 0 is anomalous, since values tell the kind of defect.
    """

    title: str
    folders: tuple[str, ...]
    list: Callable[[Listing], None]
    recognizes: Callable[[Path], bool] = lambda folder: True
    every_value: bool = False


def _is_loco(folder: Path) -> bool:
    types = ("logical_anomalies", "structural_anomalies")
    return (folder / "defects_config.json").is_file() or any(has_folder(folder, "test", name) for name in types)


def _has_masks_beside(folder: Path) -> bool:
    """Return True if train/ holds files such as 10000_GT.png."""
    path = find_folder(folder, "train")
    return path is not None and any(
        os.path.splitext(entry)[0].endswith("_GT") for entry in os.listdir(path) if not entry.startswith(".")
    )


def _has_numbered_parts(folder: Path) -> bool:
    """Return True for folders kos01, kos02, ... of files such as Part0_label.bmp."""
    parts = [entry for entry in os.listdir(folder) if entry.lower().startswith("kos")]
    first = next((folder / entry for entry in sorted(parts) if (folder / entry).is_dir()), None)
    return first is not None and any(os.path.splitext(entry)[0].endswith("_label") for entry in os.listdir(first))


# In the order in which they are tried: the special ones first.
KINDS: dict[str, Kind] = {
    "mvtec_ad_2": Kind("MVTec AD 2", ("train", "test_public"), list_mvtec_ad_2),
    "loco": Kind("MVTec LOCO AD", ("train", "test"), list_loco, _is_loco, every_value=True),
    "mvtec_3d": Kind(
        "MVTec 3D-AD",
        ("train", "test"),
        list_mvtec_3d,
        lambda folder: has_folder(folder, "train", "good", "rgb"),
        every_value=True,
    ),
    "kolektor2": Kind("KolektorSDD2", ("train", "test"), list_kolektor2, _has_masks_beside),
    "btad": Kind("BTAD", ("train",), list_btad, lambda folder: has_folder(folder, "train", "ok")),
    "mvtec": Kind("MVTec AD", ("train",), list_mvtec),
    "visa": Kind("VisA", ("Data",), list_visa, lambda folder: has_folder(folder, "Data", "Images"), every_value=True),
    "real_iad": Kind("Real-IAD", ("OK",), list_real_iad, lambda folder: has_folder(folder, "NG")),
    "kolektor": Kind("KolektorSDD", (), list_kolektor, _has_numbered_parts),
}
PLAIN = "folder"
PLAIN_TITLE = "a plain folder"


def kind_of(folder: Path, layout: Layout | FolderLayout) -> str | None:
    """Return the name of a category's layout; None if the folder is no category of the layout asked for."""
    names = layout if isinstance(layout, FolderLayout) else FolderLayout()
    asked = PLAIN if isinstance(layout, FolderLayout) else layout
    for name, kind in KINDS.items():
        there = all(has_folder(folder, part) for part in kind.folders)
        if asked == name and there and (kind.folders or kind.recognizes(folder)):
            return name
        if asked == "auto" and there and kind.recognizes(folder):
            return name
    if asked in ("auto", PLAIN) and has_folder(folder, names.normal):
        return PLAIN
    return None


def list_samples(folder: Path, kind: str, layout: Layout | FolderLayout, listing: Listing) -> None:
    """Collect the samples of a category of a known kind."""
    if kind == PLAIN:
        list_folder(listing, layout if isinstance(layout, FolderLayout) else FolderLayout())
    else:
        KINDS[kind].list(listing)
    listing.finish(title_of(kind))


def title_of(kind: str) -> str:
    """Return the name of the dataset that a layout is known from."""
    return PLAIN_TITLE if kind == PLAIN else KINDS[kind].title


def has_folder(folder: Path, *names: str) -> bool:
    """Return True if there is a folder of these names below another, whatever their case."""
    return find_folder(folder, *names) is not None


def find_folder(folder: Path, *names: str) -> Path | None:
    """Return the folder of these names below another, in upper or lower case; None if there is none."""
    for name in names:
        if (folder / name).is_dir():
            folder = folder / name
            continue
        try:
            alike = [entry for entry in os.listdir(folder) if entry.casefold() == name.casefold()]
        except OSError:
            return None
        alike = [entry for entry in alike if (folder / entry).is_dir()]
        if len(alike) != 1:
            return None
        folder = folder / alike[0]
    return folder
