"""`fastbgad info`: versions, machine, and what a model holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbgad.__main__ import main
from fastbgad.model import BGAD


def facts_in(printed: str) -> dict[str, str]:
    """Return the names and values of printed facts."""
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in printed.splitlines())}


def test_versions_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    facts = facts_in(capsys.readouterr().out)
    assert facts["torch"] in torch.__version__
    assert {"fastbgad", "python", "processor", "cores", "gpu"} <= facts.keys()


def test_info(run: tuple[Path, Path], capsys) -> None:
    _, out = run
    assert main(["info", "--model", str(out / "model.safetensors")]) == 0
    printed = capsys.readouterr().out
    facts = facts_in(printed)
    assert facts["torch"] in torch.__version__
    assert facts["method"] == "BGAD"
    assert facts["passes trained"] == "2"
    assert facts["known anomalies"] == "2, recognized by content"
    assert '"name": "gabor"' in printed


def test_known_anomalies_of_older_and_other_models(run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    model = BGAD.load(run[1] / "model.safetensors")
    older = {name: value for name, value in model.history.items() if name != "known_anomaly_files"}
    for history, expected in ((older, "2, recognized by name alone (an older file)"), ({"passes": []}, "0")):
        model.save(tmp_path / "model.safetensors", history)
        assert main(["info", "--model", str(tmp_path / "model.safetensors")]) == 0
        assert facts_in(capsys.readouterr().out)["known anomalies"] == expected
