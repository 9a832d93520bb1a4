"""Known anomalies in anomalib's datamodules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("anomalib")

from anomalib.data import MVTecAD

import fastbgad
from fastbgad.compat.anomalib import Bgad, with_known_anomalies
from tests.make_data import make_mvtec

from .engines import Run, bgad, engine, folder_data, paths, raw_scores

pytestmark = pytest.mark.filterwarnings("ignore")


def test_known_anomalies_are_in_no_other_part(run: Run, parts: Path) -> None:
    for mode in ("from_test", "same_as_test", "from_train", "none"):
        datamodule = with_known_anomalies(folder_data(parts, val_split_mode=mode), 3, repeat=2)
        datamodule.setup()
        first = paths(datamodule.known)
        datamodule.setup()
        assert paths(datamodule.known) == first == paths(run.datamodule.known)
        train = datamodule.train_data.samples
        assert (train.label_index == 1).sum() == 6
        assert set(train.image_path[train.label_index == 1]) == first
        elsewhere = paths(datamodule.test_data) | (paths(datamodule.val_data) if mode != "none" else set())
        assert not first & elsewhere
        if mode == "from_train":
            assert (datamodule.val_data.samples.label_index == 0).all()
        assert datamodule.train_data.task == "segmentation"


def test_mvtec_with_a_timm_backbone(tmp_path: Path) -> None:
    make_mvtec(tmp_path, normals=6, per_type=3, size=96, test_normals=3)
    sizes = {"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
    datamodule = with_known_anomalies(MVTecAD(tmp_path, "widget", **sizes), 1, per_type=True, seed=3)
    model = bgad(backbone="resnet10t", levels=(1, 2), pre_trained=False)
    trainer = engine(tmp_path / "run")
    (metrics,) = trainer.train(model, datamodule=datamodule)
    assert metrics["image_AUROC"] > 0.5
    split = fastbgad.split_known_anomalies(fastbgad.open_category(tmp_path, "widget"), 1, per_type=True, seed=3)
    assert model.to_fastbgad().history["known_anomalies"] == [sample.name for sample in split.known_anomalies]
    # thresholds of the model itself, in the checkpoint too
    boundary = torch.tensor(model.model.detector.thresholds()[1])
    loaded = Bgad.load_from_checkpoint(trainer.best_model_path)
    for post_processor in (model.post_processor, loaded.post_processor):
        assert torch.equal(post_processor.image_threshold, boundary)
        assert torch.equal(post_processor.pixel_threshold, boundary)
    # features are standardized as in training
    kept, statistics = loaded.model.detector.backbone, model.model.detector.backbone.standardization.state_dict()
    assert kept.standardization.fitted
    for name, tensor in kept.standardization.state_dict().items():
        assert torch.equal(tensor, statistics[name])
    # and a checkpoint of before there was a choice has them as they are
    content = torch.load(trainer.best_model_path, weights_only=False)
    for name in ("standardize", "neighborhood"):
        content["hyper_parameters"].pop(name, None)
    content["state_dict"] = {key: v for key, v in content["state_dict"].items() if ".standardization." not in key}
    torch.save(content, tmp_path / "old.ckpt")
    old = Bgad.load_from_checkpoint(tmp_path / "old.ckpt").model.detector.backbone
    assert old.standardization is None
    assert old.neighborhood == 1


def test_labels_without_validation_images(parts: Path, tmp_path: Path) -> None:
    model, trainer = bgad(), engine(tmp_path, limit_val_batches=0)
    datamodule = with_known_anomalies(folder_data(parts), 2)
    trainer.fit(model, datamodule=datamodule)
    predictions = trainer.predict(model, datamodule=datamodule)
    scores, _ = raw_scores(model, predictions)
    labels = torch.cat([batch.pred_label for batch in predictions])
    assert torch.equal(labels, scores > model.model.detector.thresholds()[1])
    assert labels.any()
    assert not labels.all()
