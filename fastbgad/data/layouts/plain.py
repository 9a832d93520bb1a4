"""The layout of a plain folder: normal and anomalous images, and masks."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ConfigError
from .listing import HOLDOUT, Listing
from .tree import Folder, ImageFile, composed


@dataclass(frozen=True)
class FolderLayout:
    """The names of a plain folder's parts.

    If there is no folder `test_normal`, a seeded share `holdout` of the normal images is kept for the test.
    """

    normal: str = "normal"
    anomalous: str = "anomalous"
    masks: str = "masks"
    test_normal: str = "test_normal"
    holdout: float = HOLDOUT
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise ConfigError(f"holdout is {self.holdout}; give the share of normals kept for the test, inside (0, 1)")
        names = (self.normal, self.anomalous, self.masks, self.test_normal)
        if len(set(names)) < len(names):
            raise ConfigError(f"the folders of a plain folder need different names; these were given: {names}")


def list_folder(listing: Listing, layout: FolderLayout) -> None:
    """List normal/, test_normal/, anomalous/ with a folder per type or none, and masks/."""
    normals = listing.normals(layout.normal)
    if (listing.root / layout.test_normal).is_dir():
        listing.train += normals
        listing.test += listing.normals(layout.test_normal)
    elif len(normals) == 1:
        listing.problems.append(
            f"{listing.root / layout.normal} holds one image; training and test need one each at least"
        )
    else:
        listing.hold_out(normals, layout.holdout, layout.seed)
    anomalous, masks = listing.tree.find(layout.anomalous), listing.tree.find(layout.masks)
    if anomalous is None:
        if (listing.root / layout.anomalous).is_dir() or masks is not None:
            listing.images(layout.anomalous)  # names the problem
        return
    _list_types(listing, layout, anomalous, has_masks=masks is not None)
    if masks is None:
        listing.note_missing_masks(listing.root / layout.masks)


def _list_types(listing: Listing, layout: FolderLayout, anomalous: Folder, has_masks: bool) -> None:
    """List the anomalous images: those in a folder are of its type, those in none are of the type "anomalous"."""
    for defect, name in listing.types(layout.anomalous):
        names = (layout.masks, name) if has_masks else None
        listing.test += listing.anomalies((layout.anomalous, name), names, defect)
    if anomalous.files:
        loose = listing.without_twins(ImageFile(anomalous.path / name, name) for name in anomalous.files)
        masks = (layout.masks,) if has_masks else None
        types = {composed(name) for name in anomalous.folders}
        listing.test += listing.anomalous(loose, anomalous.path, masks, layout.anomalous, without=types)
