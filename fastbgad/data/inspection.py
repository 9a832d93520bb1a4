"""Every file of a category looked at: what its images and masks are, and what is wrong with them."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..wording import count
from .images import image_size, largest_wide_value, read_image, stored_bits
from .masks import MaskForm, MaskReading, read_mask_closely
from .sample import Sample
from .wide_pixels import significant_bits

Check: TypeAlias = Literal["full", "quick", "none"]
OnFiles: TypeAlias = Callable[[int, int], None]
"""Called with the number of images looked at so far, and of all."""

_WHOLE = 0.98  # share of an image above which a mask covers all of it
_DEPTH_IMAGES = 16  # of a category, from which the bit depth is found
_INVERTED_SHARE, _INVERTED_BORDER = 0.5, 0.9
_FEWEST_THREADS = 8  # a disk in the network is slower than a core
_AHEAD = 64  # images in the queue of the threads


class MaskFacts(NamedTuple):
    """What is known of a mask."""

    share: float
    """Of the image's pixels that are anomalous."""
    form: MaskForm
    values: tuple[str, ...]
    inverted: bool
    """It covers most of the image, not all, and nearly all of its border: perhaps black marks the anomaly."""

    @property
    def empty(self) -> bool:
        """True for a mask without an anomalous pixel."""
        return self.share == 0

    @property
    def whole(self) -> bool:
        """True for a mask that covers the whole image."""
        return self.share >= _WHOLE


class FileFacts(NamedTuple):
    """What is known of a sample's files."""

    size: tuple[int, int] | None
    """(height, width) of the image; None if it cannot be read."""
    bits: int
    mask: MaskFacts | None
    digest: bytes
    """SHA-256 of the image's bytes; empty unless the check is full."""
    problems: tuple[str, ...]


def inspect_samples(
    samples: Sequence[Sample],
    full: bool,
    on_files: OnFiles | None = None,
    on_mask: Callable[[Sample, NDArray[np.bool_]], object] | None = None,
) -> list[FileFacts]:
    """Look at the files of samples, on all cores.

    Args:
        samples: any number.
        full: decode the images, and compute their digests; else only their headers are read.
        on_files: see `OnFiles`.
        on_mask: called with a sample and its mask, by several threads.

    Returns:
        In the order of the samples.
    """
    facts: list[FileFacts] = []
    # pillow decodes outside the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(max(_FEWEST_THREADS, os.cpu_count() or 1), thread_name_prefix="fastbgad-check") as pool:
        for start in range(0, len(samples), _AHEAD):
            part = samples[start : start + _AHEAD]
            for fact in pool.map(lambda sample: _inspect(sample, full, on_mask), part):
                facts.append(fact)
                if on_files is not None:
                    on_files(len(facts), len(samples))
    return facts


def find_bit_depth(train: Sequence[Sample]) -> int | None:
    """Return the significant bits of training images that are stored in 16, found from some; None if none is.

    The same images decide whatever the check, so that every process that opens a category finds the same.
    """
    chosen = train[:: max(1, len(train) // _DEPTH_IMAGES)][:_DEPTH_IMAGES]
    largest = [value for sample in chosen if (value := _largest(sample.image)) is not None]
    return significant_bits(largest) if largest else None


def leaks(samples: Sequence[Sample], train: int, facts: Sequence[FileFacts]) -> list[str]:
    """Report pictures that are in training and test, or normal and anomalous: they make every measured figure untrue.

    Twins within one class only weigh a little more, and public datasets have some.

    Args:
        samples: those for training first.
        train: number of those.
        facts: of a full check.
    """
    twins: defaultdict[bytes, list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        if fact.digest:
            twins[fact.digest].append(index)
    roles = [("training" if index < train else "test", sample.label) for index, sample in enumerate(samples)]
    return [
        "the same image is in training and test, or both normal and anomalous: "
        f"{', '.join(str(samples[index].image) for index in indices)}; keep one"
        for indices in twins.values()
        if len({roles[index] for index in indices}) > 1
    ]


def mask_notes(samples: Sequence[Sample], facts: Sequence[FileFacts]) -> list[str]:
    """Return sentences about masks that are not plainly black and white, or cover suspiciously much."""
    masks = [(sample, fact.mask) for sample, fact in zip(samples, facts, strict=True) if fact.mask is not None]
    notes = []
    if soft := [(sample, mask) for sample, mask in masks if mask.form == "soft edges"]:
        sample, mask = soft[0]
        notes.append(
            f"more than two values in {len(soft)} of {count(len(masks), 'mask')} (such as {sample.mask}: "
            f"{', '.join(mask.values)}, ...); pixels above half of the full range, 127 of 255, are taken as anomalous "
            "(--mask-threshold 0.5)"
        )
    if alpha := [sample for sample, mask in masks if mask.form == "alpha"]:
        notes.append(
            f"transparent pixels in {len(alpha)} of {count(len(masks), 'mask')} (such as {alpha[0].mask}); the opaque "
            "ones are taken as anomalous"
        )
    return [*notes, *_coverage_notes(masks)]


def _coverage_notes(masks: Sequence[tuple[Sample, MaskFacts]]) -> Iterator[str]:
    by_type: defaultdict[str, list[tuple[Sample, MaskFacts]]] = defaultdict(list)
    for sample, mask in masks:
        by_type[sample.defect].append((sample, mask))
    for defect, members in by_type.items():
        whole = [(sample, mask) for sample, mask in members if mask.whole]
        inverted = [(sample, mask) for sample, mask in members if mask.inverted]
        if whole:
            yield (
                f"the whole image is marked in {len(whole)} of {count(len(members), 'mask')} of type {defect} (such as "
                f"{whole[0][0].mask}: {whole[0][1].share:.0%}); check that this is meant"
            )
        if inverted:
            yield (
                f"inverted, it seems: {len(inverted)} of {count(len(members), 'mask')} of type {defect} (such as "
                f"{inverted[0][0].mask}: {inverted[0][1].share:.0%} of the image is marked, with its border); if black "
                "marks the anomaly there, invert them"
            )


def _inspect(sample: Sample, full: bool, on_mask: Callable[[Sample, NDArray[np.bool_]], object] | None) -> FileFacts:
    problems: list[str] = []
    size, bits, digest = None, 8, b""
    try:
        if full:
            height, width, _ = read_image(sample.image, sample.decoding.bit_depth).shape
            size = height, width
            digest = hashlib.sha256(sample.image.read_bytes()).digest()
        else:
            size = image_size(sample.image)
        bits = stored_bits(sample.image)
    except DataError as error:
        problems.append(str(error))
    facts = None
    if sample.mask is not None:
        try:
            reading = read_mask_closely(sample.mask, sample.decoding.mask_threshold)
        except DataError as error:
            problems.append(str(error))
        else:
            problems += _mask_problems(sample, reading.mask, size)
            facts = _mask_facts(reading)
            if on_mask is not None:
                on_mask(sample, reading.mask)
    return FileFacts(size, bits, facts, digest, tuple(problems))


def _mask_problems(sample: Sample, mask: NDArray[np.bool_], size: tuple[int, int] | None) -> Iterator[str]:
    if size is not None and mask.shape != size:
        yield (
            f"the mask {sample.mask} is {_by(mask.shape)} pixels (width x height) but its image is {_by(size)}; "
            "draw it at the image's size"
        )
    if not mask.any():
        yield (
            f"the mask {sample.mask} marks no pixel of an anomalous image; draw the anomaly or "
            "move the image to the normal ones"
        )


def _mask_facts(reading: MaskReading) -> MaskFacts:
    mask = reading.mask
    share = float(mask.mean()) if mask.size else 0.0
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    inverted = _INVERTED_SHARE < share < _WHOLE and float(border.mean()) > _INVERTED_BORDER
    return MaskFacts(share, reading.form, reading.values, inverted)


def _largest(path: Path) -> int | None:
    try:
        return largest_wide_value(path) if stored_bits(path) == 16 else None
    except DataError:  # named by the check
        return None


def _by(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"
