"""Layouts with folders for training and test: MVTec AD and those that are like it."""

from __future__ import annotations

from .listing import HOLDOUT, Listing
from .tree import Folder, ImageFile, composed


def list_mvtec(listing: Listing) -> None:
    """List MVTec AD, MPDD, AeBAD: train/good, test/<type>, ground_truth/<type>."""
    _list(listing, "good")


def list_btad(listing: Listing) -> None:
    """List BTAD: train/ok, test/ok, test/ko, ground_truth/ko."""
    _list(listing, "ok")


def list_loco(listing: Listing) -> None:
    """List MVTec LOCO: as MVTec AD, with a folder of masks per image and a part for validation.

    The values of its masks tell the kind of defect; every value but 0 is anomalous.
    """
    listing.leave_out("the part for validation, which is not used", "validation")
    _list(listing, "good")


def list_mvtec_ad_2(listing: Listing) -> None:
    """List MVTec AD 2: train/good, test_public/good, test_public/bad, test_public/ground_truth/bad."""
    listing.leave_out("the part for validation, which is not used", "validation")
    for name in ("test_private", "test_private_mixed"):
        listing.leave_out("whose images have no public labels", name)
    listing.train += listing.normals("train", "good")
    listing.test += listing.normals("test_public", "good")
    masks = ("test_public", "ground_truth")
    has_masks = listing.tree.find(*masks) is not None
    listing.test += listing.anomalies(("test_public", "bad"), (*masks, "bad") if has_masks else None, "bad")
    if not has_masks:
        listing.note_missing_masks(listing.root.joinpath(*masks))


def list_mvtec_3d(listing: Listing) -> None:
    """List the photographs of MVTec 3D-AD: train/good/rgb, test/<type>/rgb, test/<type>/gt."""
    listing.leave_out("the part for validation, which is not used", "validation")
    _leave_out_depth(listing, listing.tree)
    listing.train += listing.normals("train", "good", "rgb")
    for name, folder in listing.types("test"):
        if name == "good":
            listing.test += listing.normals("test", folder, "rgb")
            _use(listing, "test", folder, "gt")  # all black
        else:
            listing.test += listing.anomalies(("test", folder, "rgb"), ("test", folder, "gt"), name)


def _leave_out_depth(listing: Listing, folder: Folder, names: tuple[str, ...] = ()) -> None:
    for name, inner in folder.folders.items():
        if name == "xyz":
            listing.leave_out("which hold depths: photographs alone are used", *names, name)
        else:
            _leave_out_depth(listing, inner, (*names, name))


def _list(listing: Listing, good: str) -> None:
    masks_there = listing.tree.find("ground_truth") is not None
    normals = listing.normals("train", good)
    types = listing.types("test")
    if listing.tree.find("test") is None and not (listing.root / "test").is_dir():
        listing.hold_out(normals)
        if normals:
            listing.note_holdout(len(listing.test), HOLDOUT, f"{listing.root} has no folder test/")
        return
    listing.train += normals
    listing.test += listing.normals("test", good)
    _use(listing, "ground_truth", good)  # masks of normal images are black
    defects = [(name, folder) for name, folder in types if name.casefold() != good]
    for name, folder in defects:
        listing.test += listing.anomalies(("test", folder), ("ground_truth", folder) if masks_there else None, name)
    if defects and not masks_there:
        listing.note_missing_masks(listing.root / "ground_truth")
    known = {name.casefold() for name, _ in types} | {good}
    truth = listing.tree.find("ground_truth")
    for name in [] if truth is None else truth.folders:
        if composed(name).casefold() not in known:
            masks = listing.root / "ground_truth" / name
            _use(listing, "ground_truth", name)
            listing.problems.append(
                f"{masks} holds masks but {listing.root / 'test' / name} does not exist; add or remove it"
            )


def _use(listing: Listing, *names: str) -> None:
    folder = listing.tree.find(*names)
    files: list[ImageFile] = [] if folder is None else folder.images()
    listing.use(files)
