"""`fastbgad evaluate` end to end."""

from __future__ import annotations

import json
from pathlib import Path

from fastbgad.__main__ import main


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
