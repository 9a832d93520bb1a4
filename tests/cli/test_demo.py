"""`fastbgad demo` end to end, with a tiny schedule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastbgad.__main__ import main
from fastbgad.model import BGAD
from tests.models import SIZE, tiny_config


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The whole demo on one texture with a tiny schedule; a second call takes up what is there."""
    pytest.importorskip("skimage")
    monkeypatch.setattr("fastbgad.cli.demo.demo_preset", lambda method, seed: replace(tiny_config(method), seed=seed))
    monkeypatch.setattr("fastbgad.cli.demo.DEMO_IMAGE_SIZE", SIZE)
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
