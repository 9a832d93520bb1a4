"""The command line as people use it: commands end to end, help that teaches, one-line errors with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastbgad.__main__ import main
from fastbgad.cli.parser import Train, parse
from fastbgad.model import BGAD
from tests.make_data import make_mvtec
from tests.models import SIZE, tiny_config

TINY = ["--backbone", "gabor", "--image-size", str(SIZE), str(SIZE), "--flow.coupling-layers", "2"]
SHORT = ["--schedule.meta-epochs", "2", "--schedule.sub-epochs", "1", "--schedule.warmup-epochs", "1"]
FEW = ["--anomalies.num-anomalies", "2", "--anomalies.cut-paste", "1", "--anomalies.repeat", "1"]


def train(root: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--data", str(root), "--out", str(out), *TINY, *SHORT, *FEW, *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset and a finished run."""
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, normals=5, per_type=3, size=SIZE)
    out = tmp_path_factory.mktemp("runs") / "widget"
    assert main(train(root, out)) == 0
    return root, out


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


def test_evaluate_leaves_out_known_anomalies(run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    root, out = run
    command = ["evaluate", "--model", str(out / "model.safetensors"), "--data", str(root), "--out", str(tmp_path)]
    assert main([*command, "--official-pro"]) == 0
    printed = capsys.readouterr().out
    assert "left out: 2 test images that the model was trained on" in printed
    assert "official PRO" in printed
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, out))
    for name in ("image_auroc", "pixel_auroc", "aupro", "n_images"):
        assert ours[name] == theirs[name]
    assert main([*command, "--calibration", "official"]) == 0


def test_predict(run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    root, out = run
    command = ["predict", str(root / "widget" / "test"), "--model", str(out / "model.safetensors")]
    assert main([*command, "--out", str(tmp_path / "scores")]) == 0
    assert "scored 8 images" in capsys.readouterr().out
    assert len(list((tmp_path / "scores" / "maps").iterdir())) == 8


def test_predict_with_a_corrupt_image(run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    root, out = run
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    good = root / "widget" / "test" / "good" / "000.png"
    command = ["predict", str(good), str(tmp_path / "bad.png"), "--model", str(out / "model.safetensors")]
    assert main([*command, "--out", str(tmp_path / "scores")]) == 2
    printed = capsys.readouterr().out
    assert "scored 1 images" in printed
    assert "bad.png" in printed


def test_info(run: tuple[Path, Path], capsys) -> None:
    _, out = run
    assert main(["info", "--model", str(out / "model.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "torch" in printed
    assert "known anomalies" in printed
    assert '"name": "gabor"' in printed


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


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The whole demo on one texture with a tiny schedule; a second call takes up what is there."""
    pytest.importorskip("skimage")
    monkeypatch.setattr(
        "fastbgad.cli.commands.demo_preset", lambda method, seed: replace(tiny_config(method), seed=seed)
    )
    monkeypatch.setattr("fastbgad.cli.commands.DEMO_IMAGE_SIZE", SIZE)
    command = ["demo", "--out", str(tmp_path / "demo"), "--categories", "brick"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for expected in ("NFAD", "BGAD", "mean", "report.html"):
        assert expected in printed
    first = (tmp_path / "demo" / "brick" / "bgad" / "model.safetensors").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "demo" / "brick" / "bgad" / "model.safetensors").read_bytes() == first
    # both methods are measured on the same images
    metrics = [json.loads((tmp_path / "demo" / "brick" / m / "metrics.json").read_text()) for m in ("nfad", "bgad")]
    assert metrics[0]["n_images"] == metrics[1]["n_images"] == 12 + 4 * 8 - 10
    # The same with the features of a network, beside the others.
    assert main([*command, "--methods", "nfad", "--backbone", "resnet10t", "--weights", "random"]) == 0
    kept = BGAD.load(tmp_path / "demo" / "brick" / "nfad-resnet10t" / "model.safetensors")
    assert kept.architecture()["backbone"]["standardize"] == "whiten"
    assert main([*command[:3], "--categories", "sand"]) == 2
    assert "no category 'sand'" in capsys.readouterr().err


def test_presets_decide_the_defaults() -> None:
    required = ["--data", "x", "--out", "y"]
    official, demo = (parse(["train", *required, "--preset", preset]) for preset in ("official", "demo"))
    assert isinstance(official, Train)
    assert isinstance(demo, Train)
    assert official.training.schedule.meta_epochs == 25
    assert demo.training.schedule.meta_epochs < 25
    chosen = parse(["train", *required, "--preset=demo", "--schedule.meta-epochs", "3", "--method", "nfad"])
    assert isinstance(chosen, Train)
    assert chosen.training.schedule.meta_epochs == 3
    assert chosen.training.schedule.lr == demo.training.schedule.lr
    assert chosen.training.method == "nfad"
    # The official code's features and scores come with its schedule.
    assert (official.standardize, official.training.score.level_weights) == ("none", "equal")
    for preset in ("short", "demo"):
        quick = parse(["train", *required, "--preset", preset])
        assert (quick.standardize, quick.training.score.level_weights) == ("whiten", "channels")  # type: ignore[union-attr]
        assert parse(["reproduce", "--data", "x", "--out", "y", "--preset", preset]).standardize == "whiten"  # type: ignore[union-attr]
    assert parse(["reproduce", "--data", "x", "--out", "y"]).standardize == "none"  # type: ignore[union-attr]
    raw = parse(["train", *required, "--preset", "short", "--standardize", "none"])
    assert raw.standardize == "none"  # type: ignore[union-attr]


@pytest.mark.parametrize("command", ["demo", "train", "evaluate", "predict", "info"])
def test_help_teaches(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "default" in printed or command == "info"
    if command != "info":
        assert f"fastbgad {command}" in printed


def test_the_library_imports_without_the_extras() -> None:
    """tyro, rich, matplotlib, jinja2 and scikit-image belong to the command line, the report and the demo."""
    code = (
        "import sys\n"
        "for name in ('tyro', 'rich', 'matplotlib', 'jinja2', 'skimage', 'FrEIA', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import fastbgad, fastbgad.train, fastbgad.evaluate, fastbgad.predict\n"
        "from fastbgad.__main__ import main\n"
        "sys.exit(main(['info']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'fastbgad[report]'" in done.stderr
    assert "Traceback" not in done.stderr
