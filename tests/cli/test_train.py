"""`fastbgad train` end to end, and one-line errors with exit code 2 for whatever is wrong with its input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbgad.__main__ import main
from fastbgad.cli import opening
from fastbgad.cli import train as train_module
from fastbgad.data import Category, open_category
from tests.cli.conftest import FEW, SHORT, TINY, train
from tests.make_data import make_mvtec
from tests.models import SIZE


def test_train_writes_everything(run: tuple[Path, Path]) -> None:
    _, out = run
    assert {"config.json", "log.jsonl", "training.safetensors", "model.safetensors", "metrics.json", "report.html"} == {
        path.name for path in out.iterdir()
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["pixel_auroc"] <= 1
    assert metrics["versions"]["torch"]
    assert json.loads((out / "config.json").read_text())["training"]["flow"]["coupling_layers"] == 2
    page = (out / "report.html").read_text()
    assert "widget" in page
    assert "BGAD" in page


def test_resume_of_a_finished_run(run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    root, out = run
    assert main(train(root, out)) == 2
    assert "already holds a run; resume it" in capsys.readouterr().err
    assert main(train(root, out, "--resume")) == 0


def bad_mask(root: Path) -> None:
    from PIL import Image

    mask = next((root / "widget" / "ground_truth").rglob("*.png"))
    Image.open(mask).resize((32, 32)).save(mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--category", "gadget"], "gadget"),
        (["--anomalies.num-anomalies", "7"], "anomal"),
        (["--schedule.lr", "-1"], "lr is -1"),
        (["--backbone", "resnet1800"], "resnet1800"),
        (["--backbone", "resnet18", "--weights", "/no/such/file.pth"], "/no/such/file.pth"),
        (["--device", "cuda:99"], "not on this machine"),
        (["--impl", "triton", "--device", "cpu"], "the kernels run on CUDA tensors"),
        (["--types", "rust"], "rust"),
    ],
)
def test_one_clear_error(
    run, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    root, _ = run
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(train(root, tmp_path / "out", *arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_dataset_problems_are_all_listed(tmp_path: Path, capsys) -> None:
    folder = make_mvtec(tmp_path, normals=2, per_type=3, size=SIZE)
    (folder / "train" / "good" / "000.png").write_bytes(b"")
    bad_mask(tmp_path)
    assert main(train(tmp_path, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "2 problems" in error
    assert "000.png" in error
    assert "_mask.png" in error
    assert not (tmp_path / "out").exists()


def test_unwritable_output(run, tmp_path: Path, capsys) -> None:
    root, _ = run
    (tmp_path / "file").write_text("")
    assert main(train(root, tmp_path / "file" / "out")) == 2
    assert "cannot create the folder" in capsys.readouterr().err


def opened_as(monkeypatch: pytest.MonkeyPatch, change: Callable[[Category], Category]) -> None:
    """Make `train` and `evaluate` see a changed category."""
    monkeypatch.setattr(opening, "open_category", lambda *args: change(open_category(*args)))


def no_masks(category: Category) -> Category:
    return replace(category, test=tuple(s._replace(mask=None) for s in category.test))


def no_anomalies(category: Category) -> Category:
    return replace(category, test=tuple(s for s in category.test if not s.label))


def no_test_normals(category: Category) -> Category:
    return replace(category, test=tuple(s for s in category.test if s.label))


@pytest.mark.parametrize(
    ("change", "missing", "sentence"),
    [
        (no_masks, ["pixel_auroc", "aupro"], "Pixel AUROC and AUPRO need masks of anomalous images"),
        (no_anomalies, ["image_auroc", "pixel_auroc", "aupro"], "AUROC and AUPRO need anomalous test images"),
        (no_test_normals, ["image_auroc"], "Image AUROC needs normal test images"),
    ],
)
def test_nfad_measures_what_can_be_measured(
    run, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, change, missing: list[str], sentence: str
) -> None:
    root, out = run[0], tmp_path / "out"
    opened_as(monkeypatch, change)
    assert main(train(root, out, "--method", "nfad")) == 0
    printed = capsys.readouterr().out
    assert sentence in printed
    assert "nan" not in printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert [name for name in ("image_auroc", "pixel_auroc", "aupro") if metrics[name] is None] == missing
    assert sentence in (out / "report.html").read_text()
    evaluate = ["evaluate", "--model", str(out / "model.safetensors"), "--data", str(root), "--official-pro"]
    assert main([*evaluate, "--calibration", "official", "--out", str(tmp_path / "again")]) == 0
    printed = capsys.readouterr().out
    assert ("official PRO  –" in printed) == ("aupro" in missing)
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again.keys() == metrics.keys() - {"seconds", "feature_seconds"}


def test_nfad_without_any_test_image(run, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_as(monkeypatch, lambda category: replace(category, test=()))
    assert main(train(run[0], tmp_path / "out", "--method", "nfad")) == 0
    assert "nothing was measured" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["image_auroc"] is None


@pytest.mark.parametrize("change", [no_masks, no_anomalies])
def test_methods_that_learn_from_masks_say_so(
    run, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, change
) -> None:
    opened_as(monkeypatch, change)
    monkeypatch.setattr(train_module, "create_backbone", None)  # the check comes first
    assert main(train(run[0], tmp_path / "out")) == 2
    assert "--method nfad" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_half_of_few_anomalies_are_known(tmp_path: Path, capsys) -> None:
    make_mvtec(tmp_path, normals=5, per_type=1, size=SIZE)
    options = [*TINY, *SHORT, *FEW[2:], "--no-report"]
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().out
    assert "widget (MVTec AD): 5 normal images, 1 known anomaly of 2, 1 remains for the test, 3 test images;" in printed


def test_masks_that_vanish_are_named_before_training(tmp_path: Path, capsys) -> None:
    folder = make_mvtec(tmp_path, normals=5, per_type=3, size=4 * SIZE)
    speck = np.zeros((4 * SIZE, 4 * SIZE), np.uint8)
    speck[0, 0] = 255
    for mask in sorted((folder / "ground_truth" / "crack").iterdir()):
        Image.fromarray(speck).save(mask)
    assert main(train(tmp_path, tmp_path / "out", "--no-report", "--method", "nfad")) == 0
    error = capsys.readouterr().err
    assert error.count("3 of 3 masks of crack vanish at 64 x 64 pixels: pixel metrics cannot see them") == 1
    assert "--image-size 160 160 keeps all" in error
    evaluate = ["evaluate", "--model", str(tmp_path / "out" / "model.safetensors"), "--data", str(tmp_path)]
    assert main(evaluate) == 0
    assert "cannot see them; training with --image-size 160 160 keeps all" in capsys.readouterr().err
