"""`fastbgad train` end to end, and one-line errors with exit code 2 for whatever is wrong with its input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastbgad.__main__ import main
from tests.cli.conftest import train
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
