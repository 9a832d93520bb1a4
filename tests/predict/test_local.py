"""Scoring files: a line and a map per image, whatever happens on the way."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbgad.data import read_image, resize_image
from fastbgad.errors import ConfigError, DataError, OutputError
from fastbgad.model import BGAD
from fastbgad.predict.local import CSV_FILE, find_images, predict_files
from fastbgad.train.fit import fit
from tests.make_data import save
from tests.models import SIZE, tiny_config, tiny_model, tiny_split


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BGAD:
    config = tiny_config("nfad")
    model = tiny_model(config)
    fit(model, tiny_split(tmp_path_factory.mktemp("data")), config)
    return model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for name, shape in (("a.png", (64, 64, 3)), ("b.jpg", (90, 50, 3)), ("sub/a.png", (70, 64)), ("c.png", (64, 99))):
        save(folder / name, rng.integers(0, 255, shape, dtype=np.uint8))
    return folder


def rows(out: Path) -> list[dict[str, str]]:
    with (out / CSV_FILE).open(newline="") as file:
        return list(csv.DictReader(file))


def test_find_images(photos: Path) -> None:
    (photos / "notes.txt").write_text("no image")
    assert [p.relative_to(photos).as_posix() for p in find_images([photos])] == ["a.png", "b.jpg", "c.png", "sub/a.png"]
    assert find_images([photos / "b.jpg", str(photos / "*.png"), photos / "b.jpg"]) == [
        photos / "b.jpg",
        photos / "a.png",
        photos / "c.png",
    ]
    assert find_images([str(photos / "**" / "*.png")])[-1] == photos / "sub" / "a.png"
    (photos / "empty").mkdir()
    for bad, message in ((photos / "none.png", "matches nothing"), (photos / "empty", "holds no images")):
        with pytest.raises(DataError, match=message):
            find_images([bad])
    with pytest.raises(DataError, match="no image to score"):
        find_images([])


@pytest.mark.parametrize("maps", ["overlay", "png16", "npy", "none"])
def test_scores_and_maps(model: BGAD, photos: Path, tmp_path: Path, maps: str) -> None:
    out, images = tmp_path / "out", find_images([photos])
    counted: list[int] = []
    summary = predict_files(model, images, out, maps=maps, batch_size=3, on_images=counted.append)
    assert (summary.scored, summary.skipped, summary.failed) == (4, 0, ())
    assert counted == [3, 1]
    lines = rows(out)
    assert [line["image"] for line in lines] == [str(path) for path in images]
    for line, path in zip(lines, images, strict=True):
        picture = torch.from_numpy(resize_image(read_image(path), (SIZE, SIZE))).permute(2, 0, 1)
        prediction = model.predict(picture[None])
        assert float(line["score"]) == pytest.approx(float(prediction.image_score[0]), abs=1e-5)
        assert line["decision"] == ("normal", "margin", "anomalous")[int(prediction.image_side[0])]
        assert float(line["anomalous_area"]) == pytest.approx(
            float((prediction.decision == 2).float().mean()), abs=1e-3
        )
        if maps == "none":
            assert line["map"] == ""
            continue
        target = out / line["map"]
        if maps == "npy":
            assert np.allclose(np.load(target), prediction.anomaly_map[0].numpy(), atol=1e-5)
        elif maps == "png16":
            scale = json.loads((out / "maps.json").read_text())
            values = (
                np.asarray(Image.open(target)).astype(float) / 65535 * (scale["high"] - scale["low"]) + scale["low"]
            )
            exact = prediction.anomaly_map[0].numpy().clip(scale["low"], scale["high"])
            assert np.abs(values - exact).max() < (scale["high"] - scale["low"]) / 60000
        else:
            assert Image.open(target).size == Image.open(path).size
    assert len({line["map"] for line in lines}) == (1 if maps == "none" else 4)  # no two images share a map


def test_an_unreadable_image_costs_only_its_own_line(model: BGAD, photos: Path, tmp_path: Path) -> None:
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:200])
    summary = predict_files(model, find_images([photos]), tmp_path / "out", batch_size=2)
    assert summary.scored == 3
    assert len(summary.failed) == 1
    assert "b.jpg" in summary.failed[0]
    bad = next(line for line in rows(tmp_path / "out") if line["image"].endswith("b.jpg"))
    assert bad["score"] == bad["map"] == ""
    assert "b.jpg" in bad["error"]


def test_resume(model: BGAD, photos: Path, tmp_path: Path) -> None:
    """A crash in the middle of a line: the line is dropped, finished images are not scored again."""
    out, images = tmp_path / "out", find_images([photos])
    predict_files(model, images, out)
    whole = (out / CSV_FILE).read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / CSV_FILE).write_bytes(b"".join(lines[:3]) + lines[3][:9])
    with pytest.raises(OutputError, match="--resume"):
        predict_files(model, images, out)
    summary = predict_files(model, images, out, resume=True)
    assert (summary.scored, summary.skipped) == (2, 2)
    assert (out / CSV_FILE).read_bytes() == whole


def test_bit_depth(model: BGAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model was trained, unless another depth is asked for: the scores of the same images in 8 bits."""
    values = np.random.default_rng(0).integers(0, 4096, (3, 64, 64), dtype=np.uint16)
    twelve = [save(tmp_path / f"twelve/{n}.png", pixels) for n, pixels in enumerate(values)]
    scaled = {bits: np.rint(values * (255 / (2**bits - 1))).astype(np.uint8) for bits in (12, 16)}
    eight = {
        bits: [save(tmp_path / f"eight{bits}/{n}.png", pixels) for n, pixels in enumerate(images)]
        for bits, images in scaled.items()
    }

    def scores(images: list[Path], **options: object) -> list[tuple[str, str]]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        predict_files(model, images, out, maps="none", **options)
        return [(line["score"], line["anomalous_area"]) for line in rows(out)]

    expected = {bits: scores(images) for bits, images in eight.items()}
    assert expected[12] != expected[16]
    assert scores(twelve, bit_depth=16) == expected[16]
    assert scores(twelve, bit_depth=12) == expected[12]
    # A model that was trained on none of 16 bits does not know the depth of an image that uses few of them.
    assert predict_files(model, [*twelve, *eight[12]], tmp_path / "unknown", maps="none").scored == 3
    errors = [line["error"] for line in rows(tmp_path / "unknown")]
    assert ["give --bit-depth 12 for a camera of 12 bits" in error for error in errors] == [True] * 3 + [False] * 3
    monkeypatch.setitem(model.history, "bit_depth", 12)
    assert scores(twelve) == expected[12]
    assert scores(eight[12]) == expected[12]
    assert scores(twelve, bit_depth=16) == expected[16]
    brighter = save(tmp_path / "brighter.png", values[0] + 4000)
    assert predict_files(model, [brighter, *twelve], tmp_path / "out", maps="none").scored == 3
    assert [str(brighter) in line["error"] for line in rows(tmp_path / "out")] == [True, False, False, False]


def test_bad_options(model: BGAD, photos: Path, tmp_path: Path) -> None:
    images = find_images([photos])
    with pytest.raises(ConfigError, match="overlay"):
        predict_files(model, images, tmp_path / "out", maps="bmp")
    with pytest.raises(ConfigError, match="at least 1"):
        predict_files(model, images, tmp_path / "out", batch_size=0)
    for depth in (0, -12, 17):
        with pytest.raises(ConfigError, match=f"bit_depth is {depth}"):
            predict_files(model, images, tmp_path / "out", bit_depth=depth)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create the folder"):
        predict_files(model, images, tmp_path / "file" / "out")
