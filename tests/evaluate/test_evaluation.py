"""Test sets that lack something: what they define is measured, and a sentence says why the rest is not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fastbgad.data import Sample, Split
from fastbgad.evaluate import evaluate_model, false_alarms, metrics_dict, not_measured, run_report, write_report
from fastbgad.model import BGAD
from fastbgad.train import fit
from tests.models import tiny_config, tiny_model, tiny_split

PIXELS = ["pixel_auroc", "aupro"]
ALL = ["image_auroc", *PIXELS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[BGAD, Split]:
    split = tiny_split(tmp_path_factory.mktemp("data"))
    model = tiny_model(tiny_config("nfad"))
    fit(model, split, tiny_config("nfad", meta_epochs=1, warmup_epochs=0))
    return model, split


def without_masks(samples: list[Sample], count: int) -> list[Sample]:
    """Return the samples, the first so many anomalous ones without their masks."""
    first = [sample for sample in samples if sample.label][:count]
    return [sample._replace(mask=None) if sample in first else sample for sample in samples]


def test_anomalous_images_without_masks_count_for_the_image_auroc_alone(trained: tuple[BGAD, Split]) -> None:
    model, split = trained
    test, anomalous = list(split.test), sum(sample.label for sample in split.test)
    whole, some = evaluate_model(model, test), evaluate_model(model, without_masks(test, 2))
    assert some.metrics.image_auroc == whole.metrics.image_auroc
    assert not_measured(whole) == ""
    assert not_measured(some) == (
        f"Pixel AUROC and AUPRO leave out 2 of {anomalous} anomalous images, which have no mask."
    )
    kept = [s for s in test if s not in [a for a in test if a.label][:2]]
    expected = evaluate_model(model, kept).metrics
    assert (some.metrics.pixel_auroc, some.metrics.aupro) == (expected.pixel_auroc, expected.aupro)
    assert some.has_truth.tolist() == [s in kept for s in test]


@pytest.mark.parametrize("calibration", ["training", "official"])
@pytest.mark.parametrize(
    ("kind", "missing", "sentence"),
    [
        ("no masks", PIXELS, "Pixel AUROC and AUPRO need masks of anomalous images, and there are none."),
        ("normal", ALL, "AUROC and AUPRO need anomalous test images, and there are none."),
        ("anomalous", ["image_auroc"], "Image AUROC needs normal test images, and there are none."),
        ("anomalous, no masks", ALL, "Image AUROC needs normal test images, and there are none; pixel AUROC and "),
    ],
)
def test_test_sets_that_lack_something(
    trained: tuple[BGAD, Split], tmp_path: Path, kind: str, missing: list[str], sentence: str, calibration: str
) -> None:
    model, split = trained
    samples = {
        "no masks": without_masks(list(split.test), 99),
        "normal": [s for s in split.test if not s.label],
        "anomalous": [s for s in split.test if s.label],
        "anomalous, no masks": without_masks([s for s in split.test if s.label], 99),
    }[kind]
    evaluation = evaluate_model(model, samples, calibration=calibration)
    assert [name for name, value in evaluation.metrics._asdict().items() if math.isnan(value)] == missing
    assert not_measured(evaluation).startswith(sentence)
    assert [name for name, value in metrics_dict(evaluation.metrics).items() if value is None] == missing
    shares = false_alarms(model, evaluation)
    json.dumps(shares, allow_nan=False)
    classes = {kind for kind, label in (("normal", 0), ("anomalous", 1)) if any(s.label == label for s in samples)}
    assert {name.partition("_")[0] for name in shares} == classes
    report = run_report("widget", "NFAD", model, evaluation)
    assert [row.mask is None for row in report.rows] == [bool(s.label and s.mask is None) for s in samples]
    assert sum(level.normal.size + level.anomalous.size for level in report.levels) == sum(
        lp[evaluation.has_truth].numel() for lp in evaluation.levels
    )
    write_report(tmp_path / "report.html", [report], "title")
    page = (tmp_path / "report.html").read_text()
    assert not_measured(evaluation) in page
    assert page.count("<td>–</td>") == len(missing)
    assert ("no mask" in page) == ("no masks" in kind)


def test_masks_that_vanish(trained: tuple[BGAD, Split]) -> None:
    model, split = trained
    evaluation = evaluate_model(model, split.test)
    empty = evaluation._replace(masks=torch.zeros_like(evaluation.masks))
    assert not_measured(empty) == "Pixel AUROC and AUPRO need anomalous pixels, and no mask has one at 64 x 64."
