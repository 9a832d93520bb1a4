"""Test images without those that a model was trained on."""

from __future__ import annotations

from pathlib import Path

from fastbgad.data import Sample
from fastbgad.data.content import named_digests
from fastbgad.evaluate.unseen import unseen_samples


def images(folder: Path, *contents: str) -> list[Sample]:
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number}.png").write_text(content)
    return [Sample(folder / f"{number}.png", None, 1, "crack") for number in range(len(contents))]


def test_content_decides_and_names_do_not(tmp_path: Path) -> None:
    lot_a, lot_b = images(tmp_path / "a", "p", "q", "r"), images(tmp_path / "b", "x", "y", "q")
    history = {"known_anomalies": ["crack/0.png", "crack/1.png"], "known_anomaly_files": named_digests(lot_a[:2])}
    assert unseen_samples(history, lot_a).samples == (lot_a[2],)
    assert unseen_samples(history, lot_a).explanation.startswith("2 test images that the model was trained on")
    assert unseen_samples(history, lot_b).samples == (lot_b[0], lot_b[1])
    assert unseen_samples(history, lot_b).explanation.startswith("1 test image that the model was trained on")


def test_files_without_digests_go_by_names_and_say_so(tmp_path: Path) -> None:
    lot = images(tmp_path / "b", "x", "y")
    left, explanation = unseen_samples({"known_anomalies": ["crack/1.png"]}, lot)
    assert left == (lot[0],)
    assert explanation.startswith("1 test image with the name of a known anomaly")
    assert explanation.endswith("names alone decide")


def test_models_without_known_anomalies_read_no_file() -> None:
    lost = [Sample(Path("nowhere.png"), None, 1, "crack")]
    for history in ({}, {"known_anomalies": [], "known_anomaly_files": {}}):
        assert unseen_samples(history, lost) == ((lost[0],), "")
