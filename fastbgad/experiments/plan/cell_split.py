"""The images of a cell: training images, known anomalies, test images."""

from __future__ import annotations

from dataclasses import replace

from ...data import Category, Split, split_known_anomalies
from ...errors import DataError, MetricError
from .cells import Cell


def split_of(cell: Cell, category: Category) -> Split:
    """Draw the cell's known anomalies and leave the defect types that it does not test out of the test.

    Only names of files are used; no file is opened.

    Raises:
        DataError: an unknown defect type, fewer anomalies than asked for, or none left for the test.
        MetricError: the category lacks what a cell's metrics need, such as masks.
    """
    _check_metrics(category)
    split = split_known_anomalies(category, cell.num_anomalies, seed=cell.seed, types=cell.known_types)
    if cell.test_types is None:
        return split
    unknown = sorted(set(cell.test_types) - set(category.defects))
    if unknown:
        raise DataError(
            f"{category.root} has no anomaly type {', '.join(unknown)}; it holds {', '.join(category.defects)}"
        )
    test = tuple(sample for sample in split.test if not sample.label or sample.defect in cell.test_types)
    if not any(sample.label for sample in test):
        raise DataError(
            f"no anomalous image of {', '.join(cell.test_types)} is left in {category.root} for the test once "
            f"{cell.num_anomalies} are known; lower the number of known anomalies"
        )
    return replace(split, test=test)


def _check_metrics(category: Category) -> None:
    """Raise `MetricError` where one of a cell's metrics would have no value: tables and means need them all."""
    if not category.has_masks:
        lacking = "anomalous images without a mask"
    elif not category.defects:
        lacking = "no anomalous test images"
    elif all(sample.label for sample in category.test):
        lacking = "no normal test images"
    else:
        return
    raise MetricError(
        f"{category.root} has {lacking}, but every cell needs image AUROC, pixel AUROC and AUPRO; complete the "
        f"category {category.name}, leave it out, or use fastbgad train, which measures what can be measured"
    )
