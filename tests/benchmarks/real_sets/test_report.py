"""The page of `benchmarks/real.py`, from made-up results."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import real
from real_sets.grid import CONVERGENCE, LEFT_OUT, OURS, Run
from real_sets.results import METRICS, Result, read_collection, result_path, write_collection, write_result
from real_sets.summary import Contender, measured, over_categories, shared_categories, spread

FACTS = {"date": "2026-02-03", "commit": "0123abc", "processor": "Some CPU", "threads": 1, "versions": {"torch": "2"}}
COUNTS = {"normals": 30, "known": 10, "known_used": 0, "test_normal": 14, "test_anomalous": 22}
HOME = Path(real.__file__).parent


def result(method: str, image: float, category: str = "nut", seed: int = 0, setting: str = "demo") -> Result:
    """A result whose other metrics follow from its image AUROC."""
    setting = setting if method in OURS else "once"
    metrics = dict(zip(METRICS, (image, image - 0.1, image - 0.2, image - 0.3), strict=True))
    decision = {
        f"{kind}_beyond_{edge}": share
        for kind, share in (("normal", 0.25), ("anomalous", 0.75))
        for edge in ("b_n", "b_a")
    }
    run = Run(category, "lite0", 256, setting, method, seed)
    return Result(run, metrics, decision if method in OURS else None, 10.0 + seed, 2.0, COUNTS, [], dict(FACTS))


def many() -> list[Result]:
    """Two categories, two seeds; PaDiM lacks a category."""
    found = [
        result(method, image + 0.02 * seed - 0.1 * (category == "bolt"), category, seed)
        for method, image in (("bgad", 0.95), ("nfad", 0.9), ("gaussian", 0.7), ("patchcore", 0.93), ("cfa", 0.8))
        for category in ("nut", "bolt")
        for seed in (0, 1)
    ]
    return [*found, result("padim", 0.97)]


def keep(out: Path, results: list[Result]) -> None:
    for each in results:
        write_result(out, each)


def page(tmp_path: Path, *arguments: str) -> int:
    return real.main(["--page", "--out", str(tmp_path / "out"), "--folder", str(tmp_path / "home"), *arguments])


def written(tmp_path: Path) -> str:
    return (tmp_path / "home" / "REAL.md").read_text()


def test_means_and_deviations() -> None:
    assert spread([0.5]).text() == "0.500"
    assert spread([0.5, 0.7]).text() == "0.600 ± 0.141"
    found = measured(many())
    bgad = found[Contender("bgad", "lite0", 256, "demo")]
    mean = over_categories(bgad, ["bolt", "nut"], lambda each: each.metrics["image_auroc"])
    assert mean is not None
    assert mean.text() == "0.910 ± 0.014"  # 0.9 and 0.92 of the two seeds
    padim = found[Contender("padim", "lite0", 256, "once")]
    assert over_categories(padim, ["bolt", "nut"], lambda each: each.metrics["image_auroc"]) is None
    assert [contender.method for contender in found] == ["nfad", "bgad", "gaussian", "patchcore", "padim", "cfa"]


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path / "out", many())
    assert page(tmp_path) == 0
    text = written(tmp_path)
    means = text.split("## Means over categories")[1].split("## Per category")[0]
    row = "| BGAD (lite0, 256 px, demo) | 0.910 ± 0.014 | 0.810 ± 0.014 | 0.710 ± 0.014 | 0.610 ± 0.014 |"
    assert f"{row} 12 | 2 |" in means
    assert "because a category is missing: PaDiM (lite0, 256 px)" in means
    assert "| PaDiM" not in means
    nut = text.split("### nut")[1].split("## Decisions")[0]
    assert "30 normal training images, 10 known anomalies; test: 14 normal, 22 defective." in nut
    assert (
        "| BGAD (lite0, 256 px, demo) | 0.960 ± 0.014 | 0.860 ± 0.014 | 0.760 ± 0.014 | 0.660 ± 0.014 | 10.5 | 2.0 |"
        in nut
    )
    assert "| PaDiM (lite0, 256 px) | 0.970 | 0.870 |" in nut
    decisions = text.split("## Decisions")[1].split("\n## ")[0]
    assert "| nut | BGAD (lite0, 256 px, demo) | 25% | 75% | 25% | 75% |" in decisions
    assert "Gaussian" not in decisions
    assert "## Convergence" not in text
    assert all(f"- {reason}" in text for reason in LEFT_OUT.values())
    assert "Measured on Some CPU, 1 thread, 2026-02-03 to 2026-02-03, commit 0123abc." in text
    assert "are not committed" in text
    ElementTree.parse(tmp_path / "home" / "plots" / "real-accuracy.svg")
    # The README's table: BGAD, NFAD, the Gaussian, then the best two peers that have every category.
    table = capsys.readouterr().out.split("for the README:\n\n")[1].splitlines()
    assert [line.split(" (")[0] for line in table[2:]] == [
        "| BGAD",
        "| NFAD",
        "| Gaussian per level",
        "| PatchCore",
        "| CFA",
    ]


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path / "out", many())
    assert page(tmp_path) == 0
    first = {path: path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert page(tmp_path) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()} == first
    assert page(tmp_path, "--check") == 0
    (tmp_path / "home" / "REAL.md").write_text(written(tmp_path).replace("0.910", "0.999"))
    (tmp_path / "home" / "plots" / "real-old.svg").write_text("<svg/>")
    capsys.readouterr()
    assert page(tmp_path, "--check") == 1
    said = capsys.readouterr().err
    assert "REAL.md differs, first at: " in said
    assert "; run `python benchmarks/real.py --page`" in said
    assert "real-old.svg does not belong to the page" in said
    assert page(tmp_path) == 0
    assert page(tmp_path, "--check") == 0


def test_the_kept_figures_are_the_results(tmp_path: Path) -> None:
    results = many()
    path = tmp_path / "kept.json"
    write_collection(path, results)
    kept = {each.run: each for each in read_collection(path)}
    assert kept.keys() == {each.run for each in results}
    for each in results:
        found = kept[each.run]
        assert found.metrics == pytest.approx(each.metrics, abs=1e-5)
        assert (found.decision, found.images, found.facts) == (each.decision, each.images, each.facts)
    assert len(path.read_text().splitlines()) == len(results) + 3  # a line each
    path.write_text(path.read_text()[:-9])
    with pytest.raises(Exception, match=r"kept.json is damaged .* restore it from git"):
        read_collection(path)


def test_convergence(tmp_path: Path) -> None:
    for category, image in (("nut", 0.8), ("bolt", 0.6)):
        points = [
            {"passes": 2 * n, "seconds": 5.0 * n, "image_auroc": image + 0.05 * n, "pixel_auroc": 0.5, "aupro": 0.4}
            for n in (1, 2)
        ]
        base = result("bgad", 0.9, category, setting=CONVERGENCE)
        keep(tmp_path / "out", [replace(base, points=points), result("bgad", 0.9, category)])
    assert page(tmp_path) == 0
    text = written(tmp_path).split("## Convergence of BGAD")[1]
    assert "| lite0, 256 px | 2 | 5 | 0.750 | 0.500 | 0.400 | 2 |" in text
    assert "| lite0, 256 px | 4 | 10 | 0.800 | 0.500 | 0.400 | 2 |" in text
    ElementTree.parse(tmp_path / "home" / "plots" / "real-convergence.svg")
    assert "convergence)" not in written(tmp_path)  # such runs are in no other table


def test_a_damaged_result_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path / "out", many())
    path = result_path(tmp_path / "out", many()[0].run)
    content = json.loads(path.read_text())
    content["metrics"]["aupro"] = 1.5
    path.write_text(json.dumps(content))
    assert page(tmp_path) == 0
    assert f"left out: {path} is no result of this command" in capsys.readouterr().err


def test_without_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert page(tmp_path) == 2
    assert "there are no figures" in capsys.readouterr().err


def test_pictures_stay_beside_the_results(tmp_path: Path) -> None:
    each = result("bgad", 0.9)
    keep(tmp_path / "out", [each])
    images = np.full((1, 32, 32, 3), 90, np.uint8)
    np.savez(
        tmp_path / "out" / "nut" / "pictures-256.npz", names=["a<b/0.png"], images=images, masks=images[..., 0] > 9
    )
    maps = result_path(tmp_path / "out", each.run).with_suffix(".npz")
    np.savez(maps, names=["a<b/0.png"], maps=np.random.default_rng(0).random((1, 32, 32)), range=[0.0, 1.0])
    assert page(tmp_path) == 0
    gallery = (tmp_path / "out" / "page.html").read_text()
    assert gallery.count("<img ") == 3
    assert "a&lt;b/0.png" in gallery
    assert "do not publish" in gallery
    assert not list((tmp_path / "home").rglob("*.png")) + list((tmp_path / "home").rglob("*.html"))
    maps.write_bytes(b"no archive")
    assert page(tmp_path) == 0
    assert (tmp_path / "out" / "page.html").read_text().count("<img ") == 2


@pytest.mark.skipif(not (HOME / "results" / "real").is_dir(), reason="no figures are kept yet")
def test_the_committed_page_fits_the_committed_figures() -> None:
    assert real.main(["--page", "--check"]) == 0


def test_means_are_over_the_largest_block_without_a_gap() -> None:
    """As all blocks tried one after the other say."""
    on = {"bgad": "abcd", "nfad": "abc", "gaussian": "abcd", "patchcore": "abc", "padim": "e", "cfa": "ab"}
    found = measured([result(method, 0.9, category) for method, names in on.items() for category in names])
    assert shared_categories(found) == [
        "a",
        "b",
        "c",
    ]  # 4 contenders x 3, where a, b alone have 5 x 2 and all four 2 x 4
    blocks = [set(block) for size in range(1, 6) for block in itertools.combinations("abcde", size)]
    largest = max(len(block) * sum(block <= set(names) for names in on.values()) for block in blocks)
    assert largest == 12
    assert shared_categories({}) == []
