"""Datasets as folders: MVTec AD, BTAD, and a plain folder of normal and anomalous images.

| layout | training normals | test normals  | anomalies        | masks               |
|--------|------------------|---------------|------------------|---------------------|
| mvtec  | train/good       | test/good     | test/<type>      | ground_truth/<type> |
| btad   | train/ok         | test/ok       | test/ko          | ground_truth/ko     |
| folder | normal           | (held out)    | anomalous[/type] | masks[/type]        |

A mask carries its image's stem, with or without `_mask`, and any image suffix. A category is checked when it is opened
and everything wrong with it is reported at once.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from ..errors import ConfigError, DataError, DatasetProblemsError, check_choice
from ..wording import choose, did_you_mean
from .files import IMAGE_SUFFIXES
from .images import image_size, read_image
from .masks import read_mask
from .sample import GOOD, Category, Sample

Check: TypeAlias = Literal["full", "quick", "none"]
_LAYOUTS = ("auto", "mvtec", "btad", "folder")
_CHECK_THREADS = 8


@dataclass(frozen=True)
class FolderLayout:
    """The names of a plain folder's parts.

    If there is no folder `test_normal`, a seeded share `holdout` of the normal images is kept for the test.
    """

    normal: str = "normal"
    anomalous: str = "anomalous"
    masks: str = "masks"
    test_normal: str = "test_normal"
    holdout: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise ConfigError(f"holdout is {self.holdout}; give the share of normals kept for the test, inside (0, 1)")
        names = (self.normal, self.anomalous, self.masks, self.test_normal)
        if len(set(names)) < len(names):
            raise ConfigError(f"the folders of a plain folder need different names; these were given: {names}")


def list_categories(root: str | Path, layout: str | FolderLayout = "auto") -> list[str]:
    """Return the names of the categories in `root`, sorted; [`root`'s own name] if `root` itself is one.

    Raises:
        DataError: `root` is not a folder.
        ConfigError: `layout` is unknown.
    """
    return sorted(_find_categories(Path(root), layout))


def open_category(
    root: str | Path,
    category: str | None = None,
    layout: str | FolderLayout = "auto",
    check: Check = "full",
) -> Category:
    """Open a category of a dataset and check it.

    Args:
        root: the folder of the dataset or of one category.
        category: its name; may be left out where there is only one.
        layout: "auto", "mvtec", "btad", "folder", or a `FolderLayout` with other folder names.
        check: "full" decodes every image and mask and looks for images that are in training and test; "quick" reads
            the headers of the images and decodes the masks; "none" opens no file and only compares the names.

    Raises:
        DatasetProblemsError: dataset validation failed; `problems` lists every issue found.
        DataError: there is no such folder or category.
        ConfigError: `layout` or `check` is unknown.
    """
    check_choice("check", check, Check)
    root = Path(root)
    categories = _find_categories(root, layout)
    name = _choose(root, category, categories)
    folder, kind = categories[name]
    problems: list[str] = []
    if kind == "folder":
        train, test = _list_folder(folder, layout if isinstance(layout, FolderLayout) else FolderLayout(), problems)
    else:
        train, test = _list_train_test(folder, "ok" if kind == "btad" else GOOD, problems)
    if check != "none":
        problems += _check_files([*train, *test], len(train), full=check == "full")
    if problems:
        raise DatasetProblemsError(folder, problems)
    return Category(name, folder, kind, tuple(train), tuple(test))


def _find_categories(root: Path, layout: str | FolderLayout) -> dict[str, tuple[Path, str]]:
    if not isinstance(layout, FolderLayout):
        check_choice("layout", layout, _LAYOUTS)
    if not root.is_dir():
        raise DataError(f"the dataset folder {root} does not exist; check the path")
    kind = _layout_of(root, layout)
    if kind is not None:
        return {root.resolve().name: (root, kind)}
    kinds = {folder: _layout_of(folder, layout) for folder in _subfolders(root)}
    return {folder.name: (folder, kind) for folder, kind in kinds.items() if kind is not None}


def _layout_of(folder: Path, layout: str | FolderLayout) -> str | None:
    names = layout if isinstance(layout, FolderLayout) else FolderLayout()
    kind = "folder" if isinstance(layout, FolderLayout) else layout
    if (folder / "train").is_dir() and kind != "folder":
        if kind == "auto":
            return "btad" if (folder / "train" / "ok").is_dir() else "mvtec"
        return kind
    if (folder / names.normal).is_dir() and kind in {"auto", "folder"}:
        return "folder"
    return None


def _choose(root: Path, category: str | None, categories: Collection[str]) -> str:
    if not categories:
        raise DataError(
            f"no category was found in {root}: neither it nor a folder in it holds train/ (MVTec AD, BTAD) or normal/ "
            "(plain folder); check the path and the layout"
        )
    if category is None:
        if len(categories) > 1:
            raise DataError(f"{root} holds {len(categories)} categories; {choose(sorted(categories))}")
        return next(iter(categories))
    if category not in categories:
        hint = did_you_mean(category, categories)
        raise DataError(f"{root} has no category {category!r}; {hint}it holds {', '.join(sorted(categories))}")
    return category


def _list_train_test(folder: Path, good: str, problems: list[str]) -> tuple[list[Sample], list[Sample]]:
    train = _normals(folder / "train" / good, problems)
    test_normals = _normals(folder / "test" / good, problems)
    types = [(path, folder / "ground_truth" / path.name) for path in _subfolders(folder / "test") if path.name != good]
    if not types:
        problems.append(f"{folder / 'test'} has no folder of anomalous images; add one per anomaly type")
    anomalies = [sample for images, masks in types for sample in _anomalies(images, masks, images.name, problems)]
    known = {masks.name for _, masks in types} | {good}
    for masks in _subfolders(folder / "ground_truth"):
        if masks.name not in known:
            problems.append(f"{masks} holds masks but {folder / 'test' / masks.name} does not exist; add or remove it")
    return train, sorted(test_normals + anomalies, key=_order)


def _list_folder(folder: Path, layout: FolderLayout, problems: list[str]) -> tuple[list[Sample], list[Sample]]:
    normals = _normals(folder / layout.normal, problems)
    if (folder / layout.test_normal).is_dir():
        train, test_normals = normals, _normals(folder / layout.test_normal, problems)
    else:
        train, test_normals = _hold_out(normals, layout)
        if len(normals) == 1:
            problems.append(f"{folder / layout.normal} holds one image; training and test need one each at least")
    anomalous, masks = folder / layout.anomalous, folder / layout.masks
    types = [(path, masks / path.name, path.name) for path in _subfolders(anomalous)]
    # Images may lie in the folder itself, in one folder per type, or both.
    if not types or _images(anomalous):
        types.append((anomalous, masks, anomalous.name))
    anomalies = [
        sample for images, its_masks, name in types for sample in _anomalies(images, its_masks, name, problems)
    ]
    return train, sorted(test_normals + anomalies, key=_order)


def _hold_out(normals: list[Sample], layout: FolderLayout) -> tuple[list[Sample], list[Sample]]:
    count = max(1, round(layout.holdout * len(normals)))
    chosen = set(np.random.default_rng(layout.seed).permutation(len(normals))[:count].tolist())
    train = [sample for index, sample in enumerate(normals) if index not in chosen]
    return train, [sample for index, sample in enumerate(normals) if index in chosen]


def _normals(folder: Path, problems: list[str]) -> list[Sample]:
    return [Sample(image, None, 0, GOOD) for image in _class_images(folder, problems)]


def _anomalies(images: Path, masks: Path, defect: str, problems: list[str]) -> list[Sample]:
    paths = _class_images(images, problems)
    candidates = defaultdict(list)
    for mask in _images(masks):
        candidates[mask.stem].append(mask)
    if paths and not candidates:
        problems.append(f"{masks} holds no masks for the {len(paths)} images of {images}; add <image name>_mask.png")
        return []
    samples = []
    for image in paths:
        # Both are looked up, so that an image with two masks is noticed.
        matching = candidates.pop(image.stem, []) + candidates.pop(f"{image.stem}_mask", [])
        if not matching:
            problems.append(f"{image} has no mask; add {masks / image.stem}_mask.png")
        elif len(matching) > 1:
            problems.append(f"{image} has {len(matching)} masks: {', '.join(map(str, matching))}; keep one")
        else:
            samples.append(Sample(image, matching[0], 1, defect))
    for mask in (mask for left in candidates.values() for mask in left):
        problems.append(f"the mask {mask} belongs to no image in {images}; add the image or remove the mask")
    return samples


def _class_images(folder: Path, problems: list[str]) -> list[Path]:
    if not folder.is_dir():
        problems.append(f"the folder {folder} does not exist; create it and put images into it")
        return []
    paths = _images(folder)
    if not paths:
        problems.append(f"{folder} holds no images; add some ({', '.join(sorted(IMAGE_SUFFIXES))}) or remove it")
    by_stem = defaultdict(list)
    for path in paths:
        by_stem[path.stem].append(path)
    for twins in by_stem.values():
        if len(twins) > 1:
            problems.append(f"{' and '.join(map(str, twins))} have the same name; keep one, or rename it and its mask")
    return [twins[0] for twins in by_stem.values()]


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in paths if path.is_file() and not path.name.startswith("."))


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _order(sample: Sample) -> tuple[str, str]:
    return sample.defect, sample.image.name


class _FileReport(NamedTuple):
    problems: list[str]
    digest: bytes  # of the image's bytes; empty unless the check is full


def _check_files(samples: Sequence[Sample], train: int, full: bool) -> list[str]:
    # pillow decodes outside the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        reports = list(pool.map(lambda sample: _check_sample(sample, full), samples))
    problems = [problem for report in reports for problem in report.problems]
    roles = [("training" if index < train else "test", sample.label) for index, sample in enumerate(samples)]
    digests = [report.digest for report in reports]
    return problems + _find_leaks(digests, roles, [sample.image for sample in samples])


def _check_sample(sample: Sample, full: bool) -> _FileReport:
    problems, size, digest = [], None, b""
    try:
        size = read_image(sample.image).shape[:2] if full else image_size(sample.image)
        if full:
            digest = hashlib.sha256(sample.image.read_bytes()).digest()
    except DataError as error:
        problems.append(str(error))
    if sample.mask is not None:
        try:
            mask = read_mask(sample.mask)
        except DataError as error:
            problems.append(str(error))
        else:
            if size is not None and mask.shape != size:
                problems.append(
                    f"the mask {sample.mask} is {_by(mask.shape)} pixels but its image is {_by(size)}; "
                    "draw it at the image's size"
                )
            if not mask.any():
                problems.append(
                    f"the mask {sample.mask} marks no pixel of an anomalous image; draw the anomaly or "
                    "move the image to the normal ones"
                )
    return _FileReport(problems, digest)


def _find_leaks(digests: Sequence[bytes], roles: Sequence[tuple[str, int]], paths: Sequence[Path]) -> list[str]:
    """Report pictures that are in training and test, or normal and anomalous: they make every measured figure untrue.

    Twins within one class only weigh a little more, and public datasets have some.
    """
    twins = defaultdict(list)
    for index, digest in enumerate(digests):
        if digest:
            twins[digest].append(index)
    return [
        f"the same image is in training and test, or both normal and anomalous: "
        f"{', '.join(str(paths[index]) for index in indices)}; keep one"
        for indices in twins.values()
        if len({roles[index] for index in indices}) > 1
    ]


def _by(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"
