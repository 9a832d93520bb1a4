"""The feature store: what goes in comes out, wherever it is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastbgad.backbones import create_backbone
from fastbgad.errors import ConfigError, FeatureError, OutputError
from fastbgad.features import FeatureStore, StoreOptions, cell_mask
from fastbgad.features.store import extract_into


@pytest.fixture(scope="module")
def backbone():
    backbone = create_backbone("gabor")
    generator = torch.Generator().manual_seed(0)
    backbone.fit([torch.randint(0, 255, (3, 3, 64, 80), dtype=torch.uint8, generator=generator)])
    return backbone


def test_a_folder_whose_name_is_not_utf8(backbone, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xfcn")
    store = FeatureStore(backbone, (64, 80), 1, StoreOptions(placement="disk", folder=folder))
    extract_into(store, backbone, [([0], torch.zeros(1, 3, 64, 80, dtype=torch.uint8), torch.zeros(1, 64, 80) > 0)])
    assert len(list(folder.iterdir())) == 1
    store.close()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("placement", ["auto", "memory", "device", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_round_trip(backbone, tmp_path: Path, placement: str, dtype: torch.dtype) -> None:
    store = FeatureStore(backbone, (64, 80), 5, StoreOptions(placement=placement, folder=tmp_path, dtype=dtype))
    assert store.placement == ("disk" if placement == "disk" else "memory")
    assert len(list(tmp_path.iterdir())) == (placement == "disk")
    images = torch.randint(0, 255, (4, 3, 64, 80), dtype=torch.uint8)
    masks = torch.rand(4, 64, 80) < 0.1
    seen = []
    extract_into(
        store, backbone, [([4, 1, 0], images[:3], masks[:3]), ([2], images[3:], masks[3:])], on_images=seen.append
    )
    assert seen == [3, 1]
    features = backbone(images)
    for level, (channels, height, width) in enumerate(store.shapes):
        slot, position = torch.tensor([4, 2, 1, 4]), torch.tensor([0, height * width - 1, width + 1, 3])
        index = slot * height * width + position
        rows, anomalous = store.gather(level, index), store.labels(level, index)
        patches = store.patches(level)
        assert (patches is None) == (placement == "disk" and store.device.type != "cpu")
        if patches is not None:
            assert torch.equal(patches[index], rows)
        image = torch.tensor([0, 3, 1, 0])
        expected = features[level].permute(0, 2, 3, 1).reshape(4, -1, channels)[image, position]
        assert rows.dtype == dtype
        # A batch of another size may round differently by an ulp.
        assert torch.allclose(rows.float(), expected, atol=2e-3 if dtype == torch.float16 else 1e-5)
        assert torch.equal(anomalous, cell_mask(masks, (height, width), "nearest").reshape(4, -1)[image, position])
        images = store.maps(level, [4, 1])
        assert torch.equal(images.permute(0, 2, 3, 1).reshape(2, -1, channels), store.levels[level][[4, 1]])
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_cell_labels() -> None:
    """A line one pixel wide: nearest sees it only where it samples a pixel of it, any in every cell it touches."""
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, :, 5] = True
    assert cell_mask(mask, (4, 4), "nearest").sum() == 0
    cells = cell_mask(mask, (4, 4), "any")[0]
    assert cells[:, 1].all()
    assert cells.sum() == 4
    mask[0, :, 4] = True
    assert torch.equal(cell_mask(mask, (4, 4), "nearest")[0], cells)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite(backbone, value: float) -> None:
    store = FeatureStore(backbone, (64, 64), 1)
    features = [torch.zeros(1, *shape) for shape in store.shapes]
    features[1][0, 0, 0, 0] = value
    with pytest.raises(FeatureError, match="level 1 contain NaN or Inf"):
        store.put([0], features, torch.zeros(1, 64, 64, dtype=torch.bool))


def test_a_disk_that_is_too_small(backbone, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="free some space"):
        FeatureStore(backbone, (64, 64), 10**9, StoreOptions(placement="disk", folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_bad_placement(backbone) -> None:
    with pytest.raises(ConfigError, match="choose one of auto"):
        FeatureStore(backbone, (64, 64), 1, StoreOptions(placement="cloud"))
    with pytest.raises(ConfigError, match="GPU"):
        FeatureStore(backbone, (64, 64), 1, StoreOptions(placement="pinned"))
