from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbgad.data import list_categories, make_demo_dataset, open_category, read_image, read_mask
from fastbgad.errors import ConfigError, MissingDependencyError, OutputError

pytest.importorskip("skimage")
TINY = {"train_normals": 2, "test_normals": 2, "per_defect": 2, "size": 96}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "set"
    assert make_demo_dataset(root, **TINY) == ["brick", "grass", "gravel"]
    return root


def test_it_is_a_sound_dataset(demo):
    assert list_categories(demo) == ["brick", "grass", "gravel"]
    for name in list_categories(demo):
        category = open_category(demo, name, check="full")
        assert (category.layout, len(category.train), len(category.test)) == ("mvtec", 2, 2 + 8)
        assert category.defects == ("hole", "scratch", "stain", "thread")
        for sample in (*category.train, *category.test):
            with Image.open(sample.image) as image:
                assert (image.mode, image.size) == ("RGB", (96, 96))


def test_the_defaults_give_enough_anomalies_to_draw_from():
    defaults = dict(zip(make_demo_dataset.__code__.co_varnames[1:6], make_demo_dataset.__defaults__, strict=True))
    assert defaults["train_normals"] >= 20
    assert 4 * defaults["per_defect"] >= 2 * 10  # ten known ones leave as many for the test


def test_masks_cover_what_was_altered(demo):
    for name in list_categories(demo):
        for sample in open_category(demo, name).test:
            if not sample.label:
                continue
            mask = read_mask(sample.mask)
            assert 0.001 < mask.mean() < 0.15, sample
            # Photographs are gray up to a constant tint; only defects bring in other colors.
            image = read_image(sample.image).astype(int)
            color = image[:, :, 0] - image[:, :, 2]
            strange = np.abs(color - np.median(color)) > 20
            assert not (strange & ~mask).any(), sample


def test_training_and_test_come_from_disjoint_halves(demo):
    from skimage import data

    photograph = data.brick().astype(float)
    category = open_category(demo, "brick")

    def best_column(path: Path) -> int:
        """Where in the photograph the crop fits best, by normalized correlation of the whole crop."""
        crop = read_image(path).mean(axis=2)
        best, column = -2.0, -1
        for pixels in (crop, crop[:, ::-1]):
            pattern = (pixels - pixels.mean()) / pixels.std()
            products = np.fft.irfft2(np.fft.rfft2(photograph) * np.conj(np.fft.rfft2(pattern, photograph.shape)))
            window = np.fft.rfft2(np.ones_like(pattern), photograph.shape).conj()
            mean = np.fft.irfft2(np.fft.rfft2(photograph) * window) / pattern.size
            square = np.fft.irfft2(np.fft.rfft2(photograph**2) * window) / pattern.size
            score = products / pattern.size / np.sqrt(np.maximum(square - mean**2, 1e-6))
            valid = score[: 512 - 96 + 1, : 512 - 96 + 1]
            if valid.max() > best:
                best, column = valid.max(), int(np.unravel_index(valid.argmax(), valid.shape)[1])
        assert best > 0.99
        return column

    assert all(best_column(s.image) + 96 <= 256 for s in category.train)
    assert all(best_column(s.image) >= 256 for s in category.test if not s.label)


def test_the_seed_decides_every_byte(demo, tmp_path):
    make_demo_dataset(tmp_path / "again", **TINY)
    assert contents(tmp_path / "again") == contents(demo)
    make_demo_dataset(tmp_path / "other", seed=1, **TINY)
    other = contents(tmp_path / "other")
    assert other.keys() == contents(demo).keys()
    assert not any(other[name] == content for name, content in contents(demo).items() if "mask" not in name)


def test_more_images_leave_the_others_as_they_are(demo, tmp_path):
    make_demo_dataset(tmp_path / "more", **{**TINY, "train_normals": 3, "per_defect": 3})
    more, fewer = contents(tmp_path / "more"), contents(demo)
    assert len(more) == len(fewer) + 3 * (1 + 4 * 2)
    assert all(more[name] == content for name, content in fewer.items() if name != "demo.json")


def test_it_is_made_once(tmp_path):
    root = tmp_path / "set"
    make_demo_dataset(root, **TINY)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    make_demo_dataset(root, **TINY)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times
    # With other arguments an unchanged demo dataset is replaced, without leaving old images behind.
    make_demo_dataset(root, **{**TINY, "per_defect": 1})
    assert len(open_category(root, "brick").test) == 2 + 4
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("per_defect", [2, 1])
def test_nothing_of_the_user_is_overwritten(tmp_path, per_defect):
    root = tmp_path / "set"
    root.mkdir()
    (root / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=re.escape(str(root)) + ".*choose another folder"):
        make_demo_dataset(root, **TINY)
    assert contents(root) == {"thesis.txt": b"mine"}
    (root / "thesis.txt").unlink()
    make_demo_dataset(root, **TINY)
    (root / "brick/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"brick/notes\.txt was added"):
        make_demo_dataset(root, **{**TINY, "per_defect": per_defect})
    assert (root / "brick/notes.txt").read_text() == "mine"


def test_damage_is_noticed(tmp_path):
    root = tmp_path / "set"
    make_demo_dataset(root, **TINY)
    (root / "grass/train/good/001.png").unlink()
    with pytest.raises(OutputError, match=r"grass/train/good/001\.png"):
        make_demo_dataset(root, **TINY)
    (root / "demo.json").write_text("[]")
    with pytest.raises(OutputError, match="not a demo dataset"):
        make_demo_dataset(root, **TINY)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match=re.escape(f"cannot write {tmp_path / 'set'}: No space left on device")):
        make_demo_dataset(tmp_path / "set", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "set"):
        with pytest.raises(OutputError, match=re.escape(str(tmp_path / "file"))):
            make_demo_dataset(root, **TINY)


@pytest.mark.parametrize("arguments", [{"size": 32}, {"size": 300}, {"train_normals": 0}, {"seed": -1}])
def test_impossible_numbers(tmp_path, arguments):
    with pytest.raises(ConfigError):
        make_demo_dataset(tmp_path / "set", **{**TINY, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_scikit_image_is_needed_only_here(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(MissingDependencyError, match=r"scikit-image: pip install 'fastbgad\[report\]'"):
        make_demo_dataset(tmp_path / "set", **TINY)


def test_the_manifest_describes_the_set(demo):
    manifest = json.loads((demo / "demo.json").read_text())
    assert {key: manifest[key] for key in TINY} == TINY
    assert manifest["files"].keys() == contents(demo).keys() - {"demo.json"}
