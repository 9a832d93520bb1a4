"""Images that throughput is measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastbgad.bench import images as throughput_images
from fastbgad.bench.images import generate_images, open_images
from fastbgad.data import read_image
from fastbgad.data.generated import write_noise_images
from fastbgad.errors import ConfigError, DataError, OutputError
from tests.bench.conftest import SIZE, photos
from tests.make_data import make_mvtec, normal_image, save


def test_seeds(tmp_path: Path) -> None:
    one, again, other = (
        generate_images(tmp_path / name, 64, seed).samples for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    pixels = [[read_image(sample.image) for sample in samples] for samples in (one, again, other)]
    assert all(np.array_equal(a, b) for a, b in zip(pixels[0], pixels[1], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(pixels[0], pixels[2], strict=True))
    assert not np.array_equal(pixels[0][0], pixels[0][1])
    folder = photos(tmp_path / "photos", *[(8, 8)] * 40)
    chosen = [[s.image.name for s in open_images(folder, None, "auto", 20, seed).samples] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 20


def test_generated_files_cost_as_much_as_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About half a byte per value, as photographs of textures have; noise would take a whole one."""
    (path,) = write_noise_images(tmp_path, 1, 512)
    assert 0.4 < path.stat().st_size / (512 * 512 * 3) < 0.65
    image = read_image(path).astype(float)
    assert 20 < image.std() < 80
    assert np.abs(np.diff(image, axis=0)).mean() < 8
    monkeypatch.setattr(throughput_images, "_GENERATED_PIXELS", 3 * 64**2)
    assert [len(generate_images(tmp_path / "large", side, 0).samples) for side in (16, 64, 128)] == [8, 3, 2]
    with pytest.raises(ConfigError, match="side 0"):
        write_noise_images(tmp_path, 1, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create"):
        write_noise_images(tmp_path / "file" / "x", 1, 8)


def test_no_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        open_images(tmp_path / "empty", None, "auto", 1, seed=0)


def test_a_mask_that_cannot_be_read(tmp_path: Path) -> None:
    folder = make_mvtec(tmp_path, size=SIZE)
    (folder / "ground_truth" / "dent" / "001_mask.png").write_bytes(b"")
    images = open_images(tmp_path, "widget", "mvtec", 8, seed=0)
    assert len(images.samples) == 5
    assert "001_mask.png is empty" in images.skipped[0]


def test_several_categories_need_a_choice(tmp_path: Path) -> None:
    for name in ("nut", "screw"):
        make_mvtec(tmp_path, name, size=SIZE)
    with pytest.raises(DataError, match="choose one of nut, screw"):
        open_images(tmp_path, None, "auto", 1, seed=0)
    assert open_images(tmp_path, "nut", "auto", 1, seed=0).samples[0].image.is_relative_to(tmp_path / "nut")
    save(tmp_path / "loose" / "a.png", normal_image(np.random.default_rng(0), 8))
    with pytest.raises(DataError, match="no category was found"):
        open_images(tmp_path / "loose", None, "mvtec", 1, seed=0)
