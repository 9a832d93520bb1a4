from __future__ import annotations

import re
import threading
import time

import numpy as np
import pytest
import torch

from fastbgad.data import (
    SampleImages,
    load_sample,
    loading,
    open_category,
    parse_size,
    read_image,
    read_mask,
    stream_batches,
)
from fastbgad.errors import ConfigError, DataError
from tests.make_data import make_mvtec, save


@pytest.fixture
def category(tmp_path):
    make_mvtec(tmp_path, normals=9, per_type=3)
    return open_category(tmp_path)


def test_parse_size():
    assert parse_size(256) == (256, 256)
    assert parse_size((256, 320)) == (256, 320)
    assert parse_size([1, 2]) == (1, 2)


@pytest.mark.parametrize("size", [0, -3, (2,), (1, 2, 3), (4, 0), (4.0, 4), True, "ab", 1.5, None])
def test_impossible_sizes(size):
    with pytest.raises(ConfigError, match="image size"):
        parse_size(size)


def test_anomalous_sample_at_its_own_size(category):
    sample = category.test[0]
    loaded = load_sample(sample, (48, 48))
    assert (loaded.image.dtype, loaded.mask.dtype) == (torch.uint8, torch.bool)
    np.testing.assert_array_equal(loaded.image.permute(1, 2, 0), read_image(sample.image))
    np.testing.assert_array_equal(loaded.mask, read_mask(sample.mask))


def test_samples_are_resized_together(category):
    loaded = load_sample(category.test[0], (30, 64))
    assert loaded.image.shape == (3, 30, 64)
    assert loaded.mask.shape == (30, 64)
    # The rectangle of make_data is brighter than 180 and the texture darker, so the mask can be checked by the image.
    bright = (loaded.image > 165).all(0)
    assert (bright & loaded.mask).sum() / (bright | loaded.mask).sum() > 0.7


def test_normal_sample_has_an_empty_mask(category):
    loaded = load_sample(category.train[0], (32, 40))
    assert loaded.mask.shape == (32, 40)
    assert not loaded.mask.any()


def test_anomalous_sample_without_or_with_an_unfit_mask(category, tmp_path):
    sample = category.test[0]
    with pytest.raises(DataError, match=re.escape(f"{sample.image} has no mask")):
        load_sample(sample._replace(mask=None), (32, 32))
    loaded = load_sample(sample._replace(mask=None), (32, 32), needs_mask=False)
    assert torch.equal(loaded.image, load_sample(sample, (32, 32)).image)
    assert (loaded.mask.shape, loaded.mask.any()) == ((32, 32), False)
    assert load_sample(sample, (32, 32), needs_mask=False).mask.any()
    other = save(tmp_path / "other.png", np.full((10, 12), 255, np.uint8))
    with pytest.raises(DataError, match=re.escape(f"{other} is 12 x 10 pixels but its image is 48 x 48")):
        load_sample(sample._replace(mask=other), (32, 32))


def test_as_a_torch_dataset(category):
    dataset = SampleImages(category.test, 32)
    assert len(dataset) == 8
    images, masks = next(iter(torch.utils.data.DataLoader(dataset, batch_size=8)))
    assert images.shape == (8, 3, 32, 32)
    assert masks.flatten(1).any(1).tolist() == [bool(s.label) for s in category.test]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_keep_the_order(category, workers, batch_size):
    samples = [*category.train, *category.test]
    batches = list(stream_batches(samples, 24, batch_size, workers))
    assert [s for batch in batches for s in batch.samples] == samples
    assert [len(batch.samples) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    expected = [load_sample(s, (24, 24)) for s in samples]
    assert torch.equal(torch.cat([batch.images for batch in batches]), torch.stack([e.image for e in expected]))
    assert torch.equal(torch.cat([batch.masks for batch in batches]), torch.stack([e.mask for e in expected]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_ends_the_stream_with_its_error(category, workers):
    bad = category.train[5].image
    bad.write_bytes(bad.read_bytes()[:2000])
    stream = stream_batches(category.train, 24, 2, workers)
    assert len(next(stream).samples) == len(next(stream).samples) == 2
    with pytest.raises(DataError, match=re.escape(str(bad))):
        next(stream)


def test_decoding_ahead_is_bounded_and_stops_with_the_consumer(category, monkeypatch):
    started = []
    lock = threading.Lock()

    def counted(sample, size):
        with lock:
            started.append(sample)
        return load_sample(sample, size)

    monkeypatch.setattr(loading, "load_sample", counted)
    samples = category.train * 20
    threads = threading.active_count()
    stream = stream_batches(samples, 24, 4, workers=2)
    next(stream)
    time.sleep(0.3)  # long enough for all 180 images, were they asked for
    # One batch was consumed; beyond it at most batch_size + workers may have been begun.
    assert 4 <= len(started) <= 4 + 4 + 2
    stream.close()
    assert threading.active_count() == threads


def test_an_empty_stream():
    assert list(stream_batches([], 32, 4, workers=2)) == []


@pytest.mark.parametrize(("batch_size", "workers", "size"), [(0, 0, 32), (1, -1, 32), (1, 0, 0)])
def test_impossible_stream_options_are_refused_at_once(category, batch_size, workers, size):
    with pytest.raises(ConfigError):
        stream_batches(category.train, size, batch_size, workers)
