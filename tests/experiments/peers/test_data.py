"""The data module of a split: which images, labels and masks a peer sees."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("anomalib")

from fastbgad.data import load_sample
from fastbgad.experiments.peers.data import SplitData
from tests.experiments.peers.conftest import SIZE, Data


def test_a_supervised_peer_sees_known_anomalies_with_their_masks(data: Data) -> None:
    """Six normals and two known anomalies: an epoch has each normal once and each anomaly three times."""
    batches = list(SplitData(data.split, SIZE, 5, statistics=None, supervised=True).train_dataloader())
    images, labels, masks = (
        torch.cat([getattr(batch, part) for batch in batches]) for part in ("image", "gt_label", "gt_mask")
    )
    samples = [*data.split.normals, *data.split.known_anomalies]
    loaded = [load_sample(sample, SIZE) for sample in samples]
    places = [[torch.equal(image, one.image / 255) for one in loaded].index(True) for image in images]
    assert sorted(places) == [0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 7, 7]
    assert labels.tolist() == [bool(samples[place].label) for place in places]
    assert all(torch.equal(mask, loaded[place].mask) for mask, place in zip(masks, places, strict=True))
    assert not masks[~labels].any()
    assert masks[labels].any(dim=(1, 2)).all()


@pytest.mark.parametrize(("whole", "sizes"), [(True, [4]), (False, [4, 2])])
def test_training_batches(data: Data, whole: bool, sizes: list[int]) -> None:
    batches = SplitData(data.split, SIZE, 4, statistics=None, whole_batches=whole)
    expected = [load_sample(sample, SIZE).image / 255 for sample in data.split.normals]
    orders = []
    for seed in range(3):
        torch.manual_seed(seed)
        epoch = [batch.image for batch in batches.train_dataloader()]
        assert [len(images) for images in epoch] == sizes
        places = [[torch.equal(image, one) for one in expected].index(True) for image in torch.cat(epoch)]
        assert len(set(places)) == sum(sizes)
        orders.append(tuple(places))
    assert len(set(orders)) == 3
    assert [len(batch.image) for batch in batches.predict_dataloader()] == [4, 2]
    assert len(batches.predict_dataloader()) == 2
    few = SplitData(data.split, SIZE, 7, statistics=None, whole_batches=whole)
    assert [len(batch.image) for batch in few.train_dataloader()] == [6]
