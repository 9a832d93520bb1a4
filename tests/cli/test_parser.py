"""The command line as a whole: defaults of presets, help, and what a missing extra says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastbgad.cli.parser import Train, parse


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


@pytest.mark.parametrize(
    ("command", "taught"),
    [
        ("demo", ("fastbgad demo --out runs/demo --backbone", "(default: brick grass gravel)")),
        ("check", ("fastbgad check mvtec --category screw --check full", "(default: quick)", "--mask-suffix")),
        ("train", ("fastbgad train --data mvtec --category screw --out runs/screw", "(default:")),
        ("evaluate", ("fastbgad evaluate --model runs/screw/model.safetensors", "(default:")),
        ("predict", ("fastbgad predict --model runs/screw/model.safetensors", "(default: overlay)")),
        ("convert", ("fastbgad convert official.pt screw.safetensors", "(default:")),
        ("export", ("fastbgad export --model runs/screw/model.safetensors", "(default: onnx)")),
        ("info", ("Show versions, machine and, if one is given, what a model file holds.", "--model")),
    ],
)
def test_help_teaches(command: str, taught: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse([command, "--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"usage: fastbgad {command}" in printed
    for text in taught:
        assert text in printed


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
