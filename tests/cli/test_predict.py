"""`fastbgad predict` end to end, in this process."""

from __future__ import annotations

from pathlib import Path

from fastbgad.__main__ import main


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
