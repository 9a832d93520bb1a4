"""The qualitative figure: both methods on the same images, and damaged files named."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastbgad.experiments.results.pictures import load_examples
from fastbgad.render.plots import heat_colors
from tests.experiments.results.conftest import keep_maps, page_of, results_of
from tests.made_up_results import cell, sweep, table


def test_the_qualitative_figure_takes_both_methods_maps_of_the_same_images(tmp_path):
    plan = table(methods=["nfad", "bgad"])
    keep_maps(tmp_path, cell("carpet", "nfad"))
    # In another order, and with a map that is hot everywhere.
    names = ("hole/0.png", "cut/0.png")
    keep_maps(tmp_path, cell("carpet", "bgad"), names=names, maps=np.ones((2, 40, 40), np.float16))
    keep_maps(tmp_path, cell("grid", "bgad", 1))
    examples, problems = load_examples(tmp_path, [plan])
    assert problems == []
    assert [(e.category, e.name) for e in examples] == [
        ("carpet", "cut/0.png"), ("carpet", "hole/0.png"), ("grid", "cut/0.png"), ("grid", "hole/0.png"),
    ]  # fmt: skip
    assert [panel.caption for panel in examples[0].panels] == ["Input", "Ground truth", "NFAD map", "BGAD map"]
    photo, _, nfad, bgad = (panel.picture for panel in examples[0].panels)
    hottest = heat_colors(np.array([1.0]))[0].astype(float)
    for picture, (y, x), is_hot in ((nfad, (20, 20), True), (nfad, (2, 2), False), (bgad, (2, 2), True)):
        assert (np.abs(picture[y, x] - hottest).mean() < 40) == is_hot
    assert photo.shape == (40, 40, 3)
    assert [panel.picture is None for panel in examples[2].panels] == [False, False, True, False]  # no NFAD of grid
    page = page_of(tmp_path, [plan], results_of(plan))
    assert page.text.count("no map") == 2
    assert len(page.values("img", "src")) == 4 * 4 - 2
    with Image.open(tmp_path / "qualitative.png") as figure:
        assert figure.width > 4 * 192
        assert figure.height > 4 * 192


def test_a_pair_of_maps_is_preferred_to_a_single_one(tmp_path):
    plan = table(categories=["carpet"], seeds=[0, 1])
    keep_maps(tmp_path, cell("carpet", "nfad", 0))
    for method in ("nfad", "bgad"):
        keep_maps(tmp_path, cell("carpet", method, 1), names=(f"cut/{method}.png", "cut/both.png"))
    examples, _ = load_examples(tmp_path, [plan])
    assert [e.name for e in examples] == ["cut/nfad.png", "cut/both.png"]
    # Maps of sweeps and of other plans are not looked at.
    assert load_examples(tmp_path, [sweep()]) == ([], [])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b""), "it is no archive"),
        (lambda file: file.write_bytes(file.read_bytes()[:700]), "it is no archive"),
        (lambda file: np.savez(file, names=np.array(["a"])), "it is no archive"),
        (lambda file: np.savez(file, names=np.array([{}])), "it is no archive"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_goes_on(tmp_path, damage, message):
    plan = table(categories=["carpet", "grid"])
    for category in ("carpet", "grid"):
        keep_maps(tmp_path, cell(category))
    broken = tmp_path / "pictures" / f"{cell('carpet').key}.npz"
    damage(broken)
    page = page_of(tmp_path, [plan], results_of(plan))
    assert f"pictures/{broken.name} is left out: {message}" in page.text
    assert len(page.values("img", "src")) == 2 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": np.zeros((4, 40, 39), np.float16)}, "do not belong together"),
        ({"images": np.zeros((4, 40, 40), np.uint8)}, "do not belong together"),
        ({"range": np.zeros(3, np.float32)}, "names or its range"),
        (
            {"images": np.zeros((3, 9, 9, 3), np.uint8), "masks": np.ones((3, 9, 9)), "maps": np.ones((3, 9, 9))},
            "names or its range",
        ),
        ({"maps": np.full((4, 40, 40), np.nan, np.float16)}, "NaN"),
        ({"images": np.zeros((4, 40, 40, 3), np.float32)}, "uint8"),
    ],
)
def test_maps_that_make_no_sense_are_told(tmp_path, changes, message):
    keep_maps(tmp_path, cell("carpet"), **changes)
    examples, (problem,) = load_examples(tmp_path, [table()])
    assert examples == []
    assert message in problem
    assert "carpet" in problem
