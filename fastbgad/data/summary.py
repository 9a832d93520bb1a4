"""What a category holds, in numbers: for a report in the terminal or as JSON, made from a survey."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .category import Survey, survey_category
from .inspection import Check, FileFacts, OnFiles
from .layouts import FileOptions, FolderLayout, Layout
from .sample import GOOD, Sample
from .splits import split_known_anomalies
from .vanished import VanishedMasks


@dataclass(frozen=True)
class MaskSummary:
    """The masks of a type of anomaly. All but `number` and `without` is known only if the files were looked at.

    Attributes:
        number: images with a mask.
        without: anomalous images without one.
        unreadable: masks that cannot be read, or are none.
        least: the smallest share of an image that a mask covers.
        median: of these shares.
        most: the largest one.
        empty: masks without an anomalous pixel.
        whole: masks that cover the whole image.
        inverted: masks that look as if black marked the anomaly.
        soft_edges: masks of more than two values, cut at half.
        alpha: masks whose opaque pixels are anomalous.
        vanished: masks of which no pixel is left at the model's image size.
    """

    number: int
    without: int
    unreadable: int | None = None
    least: float | None = None
    median: float | None = None
    most: float | None = None
    empty: int | None = None
    whole: int | None = None
    inverted: int | None = None
    soft_edges: int | None = None
    alpha: int | None = None
    vanished: int | None = None


@dataclass(frozen=True)
class TypeSummary:
    """The images of one type.

    Attributes:
        name: of the type; "good" for normal images.
        training: images for training, anomalous ones as those from which known anomalies are drawn.
        test: images for the test, before known anomalies are drawn from them.
        masks: of an anomalous type.
    """

    name: str
    training: int
    test: int
    masks: MaskSummary | None


@dataclass(frozen=True)
class SizeSummary:
    """The sizes of the images that can be read, in pixels.

    Attributes:
        different: number of sizes.
        heights: the smallest and the largest.
        widths: the smallest and the largest.
        most_common: (height, width).
        most_common_images: how many images have that.
    """

    different: int
    heights: tuple[int, int]
    widths: tuple[int, int]
    most_common: tuple[int, int]
    most_common_images: int


@dataclass(frozen=True)
class VanishedSummary:
    """What the model's image size loses.

    Attributes:
        image_size: (height, width) of the model.
        masks: of which no pixel is left.
        of: masks that were looked at.
        smallest_size: the smallest larger size that keeps all, the size itself if none is lost; None if not even the
            masks' own size does.
    """

    image_size: tuple[int, int]
    masks: int
    of: int
    smallest_size: tuple[int, int] | None


@dataclass(frozen=True)
class SplitSummary:
    """How the images would be used.

    Attributes:
        normals: for training.
        known: anomalous images for training.
        tested_normal: normal images of the test.
        tested_anomalous: anomalous images of the test.
    """

    normals: int
    known: int
    tested_normal: int
    tested_anomalous: int


@dataclass(frozen=True)
class SkippedSummary:
    """Files or folders that were left out for one reason.

    Attributes:
        reason: follows "file" or "folder", such as "file with a hidden name".
        number: of files.
        first: names of the first.
    """

    reason: str
    number: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class CategorySummary:
    """A category in numbers; one that cannot be opened has problems alone.

    Attributes:
        name: of its folder.
        root: its folder.
        layout: "mvtec", "btad", "folder", ...
        title: name of the dataset that the layout is known from.
        types: normal images first, then the types of anomalies, sorted.
        sizes: None if no image was looked at, or none can be read.
        bits: (stored bits of a value, number of images), sorted.
        bit_depth: significant bits of images that are stored in 16, where that is not all.
        mask_threshold: share of the full range above which a pixel of a mask is anomalous; None is the usual rule.
        split: None if the images cannot be divided; problems or notes say why.
        vanished: None if no mask was looked at.
        skipped: what was left out, by reason.
        skipped_sentences: the same for readers, with names relative to the root.
        problems: sentences about what must be mended.
        notes: sentences about how the category is read.
    """

    name: str
    root: str
    layout: str | None = None
    title: str | None = None
    types: tuple[TypeSummary, ...] = ()
    sizes: SizeSummary | None = None
    bits: tuple[tuple[int, int], ...] = ()
    bit_depth: int | None = None
    mask_threshold: float | None = None
    split: SplitSummary | None = None
    vanished: VanishedSummary | None = None
    skipped: tuple[SkippedSummary, ...] = ()
    skipped_sentences: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as values that JSON has."""
        facts = asdict(self) | {"bits": [{"bits": bits, "images": images} for bits, images in self.bits]}
        del facts["skipped_sentences"]
        return facts


class CheckedCategory:
    """A category that was looked at, with the masks that are lost at a model's image size.

    Args: see `survey_category`.

    Attributes:
        survey: what was found.
        counts: of masks that vanish.
        vanished: the samples with these.
    """

    def __init__(
        self,
        root: str | Path,
        category: str | None,
        image_size: tuple[int, int],
        layout: Layout | FolderLayout = "auto",
        check: Check = "quick",
        files: FileOptions | None = None,
        on_files: OnFiles | None = None,
    ) -> None:
        self.counts = VanishedMasks(image_size)
        self.vanished: set[Sample] = set()

        def on_mask(sample: Sample, mask: NDArray[np.bool_]) -> None:
            if self.counts.add(sample.defect, mask):
                self.vanished.add(sample)  # one bytecode, so threads need no lock

        self.survey: Survey = survey_category(root, category, layout, check, files, on_files, on_mask)

    def summary(self, num_anomalies: int | None = None) -> CategorySummary:
        """Return the category in numbers; `num_anomalies` of them would be known, as `split_known_anomalies` takes it.

        Raises:
            ConfigError: `num_anomalies` is negative.
        """
        survey, category = self.survey, self.survey.category
        problems, notes = list(survey.problems), list(survey.notes)
        split = None
        try:
            split = _split_summary(survey, num_anomalies)
        except DataError as error:
            # Training without anomalies is still possible, unless so many were asked for.
            (notes if num_anomalies is None else problems).append(str(error))
        samples = survey.samples
        skipped = survey.skipped
        return CategorySummary(
            category.name,
            str(category.root),
            category.layout,
            survey.title,
            tuple(_types(survey, self.vanished)),
            _sizes(survey.facts),
            tuple(sorted(Counter(fact.bits for fact in survey.facts if fact.size is not None).items())),
            next((s.decoding.bit_depth for s in samples if s.decoding.bit_depth is not None), None),
            next((s.decoding.mask_threshold for s in samples if s.decoding.mask_threshold is not None), None),
            split,
            self._vanished_summary(),
            tuple(
                SkippedSummary(reason, number, tuple(skipped.names[reason]))
                for reason, number in skipped.counts.items()
            ),
            tuple(skipped.sentences(category.root)),
            tuple(problems),
            tuple(notes),
        )

    def _vanished_summary(self) -> VanishedSummary | None:
        lost, total = self.counts.total
        if not total:
            return None
        return VanishedSummary(self.counts.size, lost, total, self.counts.smallest_size())


def _split_summary(survey: Survey, num_anomalies: int | None) -> SplitSummary:
    split = split_known_anomalies(survey.category, num_anomalies)
    anomalous = sum(sample.label for sample in split.test)
    return SplitSummary(len(split.normals), len(split.known_anomalies), len(split.test) - anomalous, anomalous)


def _types(survey: Survey, vanished: set[Sample]) -> list[TypeSummary]:
    training = Counter(sample.defect for sample in (*survey.category.train, *survey.category.known))
    test = Counter(sample.defect for sample in survey.category.test)
    anomalous = sorted({sample.defect for sample in survey.samples if sample.label})
    summaries = [TypeSummary(GOOD, training[GOOD], test[GOOD], None)] if survey.samples else []
    for defect in anomalous:
        samples = [(i, sample) for i, sample in enumerate(survey.samples) if sample.label and sample.defect == defect]
        facts = [survey.facts[i] for i, _ in samples] if survey.facts else None
        masks = _masks([sample for _, sample in samples], facts, vanished)
        summaries.append(TypeSummary(defect, training[defect], test[defect], masks))
    return summaries


def _masks(samples: Sequence[Sample], facts: Sequence[FileFacts] | None, vanished: set[Sample]) -> MaskSummary:
    number = sum(sample.mask is not None for sample in samples)
    if facts is None:
        return MaskSummary(number, len(samples) - number)
    masks = [fact.mask for fact in facts if fact.mask is not None]
    shares = [mask.share for mask in masks]
    return MaskSummary(
        number,
        len(samples) - number,
        number - len(masks),
        min(shares, default=None),
        median(shares) if shares else None,
        max(shares, default=None),
        sum(mask.empty for mask in masks),
        sum(mask.whole for mask in masks),
        sum(mask.inverted for mask in masks),
        sum(mask.form == "soft edges" for mask in masks),
        sum(mask.form == "alpha" for mask in masks),
        sum(sample in vanished for sample in samples),
    )


def coverage_text(share: float) -> str:
    """Return a share of an image in percent, without the sign: two digits that matter, and 0 and 100 only if exact."""
    percent = 100 * share
    if percent in (0, 100):
        return f"{percent:.0f}"
    if percent < 0.01:
        return "<0.01"
    return f"{percent:.2f}" if percent < 1 else f"{percent:.1f}" if percent < 10 or percent >= 99 else f"{percent:.0f}"


def _sizes(facts: Sequence[FileFacts]) -> SizeSummary | None:
    sizes = Counter(fact.size for fact in facts if fact.size is not None)
    if not sizes:
        return None
    heights, widths = zip(*sizes, strict=True)
    most_common, images = sizes.most_common(1)[0]
    return SizeSummary(len(sizes), (min(heights), max(heights)), (min(widths), max(widths)), most_common, images)
