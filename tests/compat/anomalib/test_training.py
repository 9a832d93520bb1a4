"""Schedule, kept features and synthesized anomalies of a training run in anomalib."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("anomalib")

from torchvision.transforms import v2

from fastbgad.compat.anomalib import with_known_anomalies
from fastbgad.compat.anomalib.training import EpochShare, divided
from fastbgad.config import ScheduleConfig

from .engines import bgad, engine, folder_data, training_features

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_phase_without_a_normal_image_to_train_on(parts: Path, tmp_path: Path) -> None:
    """Batches of anomalies alone are passed over in phase one; the model can be validated all the same."""
    model = bgad()
    crowded = with_known_anomalies(folder_data(parts, train_batch_size=1), 3, repeat=200)
    engine(tmp_path, limit_train_batches=2).fit(model, datamodule=crowded)
    first, second = model.model.detector.history["passes"]
    assert first["loss"] == 0 < second["loss"]


def test_the_official_schedule_is_200_epochs() -> None:
    assert divided(ScheduleConfig(sub_epochs=1), 200) == ScheduleConfig()
    short = divided(ScheduleConfig(), 2)
    assert (short.meta_epochs, short.sub_epochs, short.warmup_epochs) == (2, 1, 1)
    for epochs in range(1, 300):
        schedule = divided(ScheduleConfig(), epochs)
        assert (schedule.meta_epochs - 1) * schedule.sub_epochs < epochs <= schedule.meta_epochs * schedule.sub_epochs


def test_every_epoch_has_new_synthesized_anomalies(parts: Path) -> None:
    features, datamodule = training_features(bgad(cut_paste=3), with_known_anomalies(folder_data(parts), 2))
    batch = next(iter(datamodule.train_dataloader()))
    shares = [[features.of_batch(batch, [], EpochShare(epoch, number, 4)) for number in range(4)] for epoch in (1, 2)]
    for epoch in shares:
        assert sum(len(levels[0].features) for levels in epoch if levels) == 2 * 3
        assert all(bool(levels[0].anomalous.flatten(1).any(dim=1).all()) for levels in epoch if levels)
    first, second = (torch.cat([levels[0].features for levels in epoch if levels]) for epoch in shares)
    assert not torch.equal(first, second)


def test_augmented_images_are_not_taken_from_the_cache(parts: Path, tmp_path: Path) -> None:
    flipped = folder_data(parts, train_augmentations=v2.RandomHorizontalFlip(p=1.0))
    features, datamodule = training_features(bgad(method="nfad"), flipped)
    batch = next(iter(datamodule.train_dataloader()))
    found = features.of_batch(batch, range(len(batch.image)), None)[0].features
    expected = features._detector.backbone(batch.image)[0].permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(found, expected)
    kept = features._kept([features._slots[path] for path in batch.image_path])[0].features
    assert not torch.allclose(kept, expected, atol=1e-2)
    engine(tmp_path, max_epochs=1).train(bgad(method="nfad"), datamodule=flipped)
