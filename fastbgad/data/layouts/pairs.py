"""Masks found for images by their names."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ...wording import count, listed
from ..files import IMAGE_SUFFIXES
from .tree import ImageFile, composed

_USUAL = "_mask"
_SHOWN = 3


class Pairs(NamedTuple):
    """The masks of images, and what is wrong with the others."""

    masks: dict[str, Path]
    """By the key of the image: a file, or a folder of files that are parts of one mask."""
    problems: list[str]


def pair_masks(
    images: Sequence[ImageFile], masks: Sequence[ImageFile], folder: Path, mask_folder: Path, suffix: str | None
) -> Pairs:
    """Find the mask of each image.

    An image `a/000.png` has the mask `a/000_mask.png` or `a/000.png` below the masks' folder, or several in a folder
    `a/000/`. The masks of images in folders may also lie in the masks' folder itself, if the names stay different.

    Args:
        images: with different keys.
        masks: all images below the folder of masks.
        folder: of the images, for messages.
        mask_folder: of the masks.
        suffix: ending of masks' names; None for `_mask`, in upper or lower case, or none.
    """
    ending = _USUAL if suffix is None else _without_image_suffix(suffix)
    candidates, parts = _by_image(masks, ending, exact=suffix is not None)
    last_names = Counter(os.path.basename(image.key) for image in images)
    found: dict[str, Path] = {}
    problems: list[str] = []
    missing: list[ImageFile] = []
    consumed: set[Path] = set()
    for image in images:
        name = os.path.basename(image.key)
        matching = candidates.pop(image.key, [])
        if not matching and name != image.key and last_names[name] == 1:
            matching = candidates.pop(name, [])
        # Both are looked up, so that an image with two masks is noticed.
        folders = parts.pop(image.key, [])
        consumed.update(mask.path for mask in (*matching, *folders))
        if len(matching) + bool(folders) > 1:
            paths = [*(str(mask.path) for mask in matching), *(str(mask.path.parent) for mask in folders[:1])]
            problems.append(f"{image.path} has {len(paths)} masks: {', '.join(paths)}; keep one")
        elif matching:
            found[image.key] = matching[0].path
        elif folders:
            found[image.key] = folders[0].path.parent
        else:
            missing.append(image)
    left = list(dict.fromkeys(mask for group in (*candidates.values(), *parts.values()) for mask in group))
    left = [mask for mask in left if mask.path not in consumed]
    problems += _unpaired(missing, left, folder, mask_folder, ending)
    return Pairs(found, problems)


def _without_image_suffix(ending: str) -> str:
    stem, suffix = os.path.splitext(ending)
    return stem if suffix.lower() in IMAGE_SUFFIXES else ending


def _by_image(
    masks: Iterable[ImageFile], ending: str, exact: bool
) -> tuple[defaultdict[str, list[ImageFile]], defaultdict[str, list[ImageFile]]]:
    """Return masks by the key of the image that they may belong to, as files and as parts of a folder."""
    files: defaultdict[str, list[ImageFile]] = defaultdict(list)
    parts: defaultdict[str, list[ImageFile]] = defaultdict(list)
    for mask in masks:
        key = mask.key
        files[key].append(mask)
        end = key[-len(ending) :]
        if len(key) > len(ending) and (end == composed(ending) or (not exact and end.lower() == ending)):
            files[key[: -len(ending)]].append(mask)
        if os.sep in key:
            parts[os.path.dirname(key)].append(mask)
    return files, parts


def _unpaired(
    missing: list[ImageFile], left: list[ImageFile], folder: Path, mask_folder: Path, ending: str
) -> list[str]:
    """Return the problems of images without mask and masks without image; those that are nearly right first."""
    problems = []
    groups: defaultdict[str, list[tuple[ImageFile, ImageFile]]] = defaultdict(list)
    by_key = {image.key: image for image in missing}
    by_folded = {image.key.casefold(): image for image in missing}
    for mask in left:
        image, reason = _nearly(mask, by_key, by_folded)
        if image is not None:
            groups[reason].append((image, mask))
    explained: set[ImageFile] = set()
    for reason, pairs in groups.items():
        pairs = [(image, mask) for image, mask in pairs if image not in explained]
        if not pairs:
            continue
        explained |= {file for pair in pairs for file in pair}
        image, mask = pairs[0]
        others = listed([other.path.name for _, other in pairs[1:]], _SHOWN)
        more = f" (also {others})" if others else ""
        suffix = mask.path.suffix
        remedy = f"rename it to {os.path.basename(image.key)}{ending}{suffix}"
        if reason.startswith("suffix "):
            remedy += f", or give --mask-suffix {reason.removeprefix('suffix ')}"
        problems.append(
            f"{count(len(pairs), 'image')} of {folder} without mask: for {image.path.name} there is {mask.path}{more}; "
            f"{remedy}"
        )
    problems += [
        f"{image.path} has no mask; add {mask_folder / image.key}{ending}.png"
        for image in missing
        if image not in explained
    ]
    problems += [
        f"the mask {mask.path} belongs to no image in {folder}; add the image or remove the mask"
        for mask in left
        if mask not in explained
    ]
    return problems


def _nearly(
    mask: ImageFile, by_key: dict[str, ImageFile], by_folded: dict[str, ImageFile]
) -> tuple[ImageFile | None, str]:
    """Return the image whose name the mask's nearly matches, and how: by another suffix, by case, or as its end."""
    key = mask.key
    for length in range(len(key) - 1, 0, -1):
        if (image := by_key.get(key[:length])) is not None:
            return image, f"suffix {key[length:]}"
    folded = key.casefold().removesuffix(_USUAL)
    if (image := by_folded.get(folded)) is not None:
        return image, "case"
    for start in range(1, len(key)):
        if (image := by_key.get(key[start:])) is not None:
            return image, "prefix"
    return None, ""
