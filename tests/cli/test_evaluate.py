"""`fastbgad evaluate` end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fastbgad.__main__ import main
from fastbgad.model import BGAD
from tests.make_data import make_mvtec
from tests.models import SIZE


def test_evaluate_leaves_out_known_anomalies(run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    root, out = run
    command = ["evaluate", "--model", str(out / "model.safetensors"), "--data", str(root), "--out", str(tmp_path)]
    assert main([*command, "--official-pro"]) == 0
    printed = capsys.readouterr().out
    assert "left out: 2 test images that the model was trained on (same content as its known anomalies)\n" in printed
    assert "official PRO" in printed
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, out))
    for name in ("image_auroc", "pixel_auroc", "aupro", "n_images"):
        assert ours[name] == theirs[name]
    assert main([*command, "--calibration", "official"]) == 0


def test_known_anomalies_are_recognized_by_content(run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    """Another lot has the same names and other pixels, and a copy may have other names."""
    root, out = run
    known = BGAD.load(out / "model.safetensors").history["known_anomalies"]
    lot, renamed = tmp_path / "lot", tmp_path / "renamed"
    make_mvtec(lot, normals=5, per_type=3, size=SIZE, seed=7)
    shutil.copytree(root, renamed)
    for name in known:
        for path in (renamed / "widget").glob(f"*/{name.split('.')[0]}*"):
            path.rename(path.with_name(path.name.replace("00", "9")))
    for folder, expected in ((lot, 0), (renamed, 2)):
        assert main(["evaluate", "--model", str(out / "model.safetensors"), "--data", str(folder)]) == 0
        printed = capsys.readouterr().out
        assert (f"left out: {expected} test images" in printed) == ("left out" in printed) == bool(expected)
