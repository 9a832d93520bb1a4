"""Made-up results, published numbers and stored maps for the tests of results."""

from __future__ import annotations

import numpy as np

from fastbgad.experiments.plan.setup import Setup
from fastbgad.experiments.results.outputs import write_outputs
from tests.evaluate.test_report import Page
from tests.made_up_results import cell, published, result

NUMBERS = [
    published("carpet", "DRA", "image_auroc", 0.6),
    published("carpet", "NFAD", "image_auroc", 0.9),
    published("mean", "BGAD", "image_auroc", 0.95, 0.002),
    published("mean", "NFAD", "image_auroc", 0.93),
]
VALUES = {
    ("carpet", "nfad"): (0.91, 0.93),
    ("grid", "nfad"): (0.95, 0.97),
    ("carpet", "bgad"): (0.98, 0.99),
    ("grid", "bgad"): (0.96,),  # the second seed is missing
}
RESULTS = {
    (one := cell(category, method, seed)): result(one, value, value + 0.01)
    for (category, method), values in VALUES.items()
    for seed, value in enumerate(values)
}
FACTS = {"command": "fastbgad reproduce btad", "versions": {"torch": "2.11.0"}, "long": list(range(40))}


def results_of(*plans, value: float = 0.9, best: float | None = 0.95, **changes):
    return {one: result(one, value, best, **changes) for plan in plans for one in plan.cells}


def page_of(tmp_path, plans, results, facts=FACTS) -> Page:
    files = write_outputs(tmp_path, plans, results, Setup(), facts)
    assert files[-1] == tmp_path / "reproduce.html"
    assert all(file.is_file() for file in files)
    return Page(files[-1])


def keep_maps(tmp_path, of, names=("cut/0.png", "cut/1.png", "hole/0.png", "good/0.png"), **changes) -> None:
    """The file of a cell: noise, a square defect on all images but the good ones, and scores of 1 there."""
    count, rng = len(names), np.random.default_rng(0)
    masks = np.zeros((count, 40, 40), bool)
    masks[[not name.startswith("good") for name in names], 10:30, 10:30] = True
    images = rng.integers(90, 110, (count, 40, 40, 3), dtype=np.uint8)
    arrays = {"names": np.array(names), "images": images, "masks": masks, "maps": masks.astype(np.float16)}
    (tmp_path / "pictures").mkdir(exist_ok=True)
    arrays |= {"range": np.array([0, 1], np.float32)} | changes
    np.savez(tmp_path / "pictures" / f"{of.key}.npz", **arrays)
