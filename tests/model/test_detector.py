"""The detector: alone or in a batch the same, saved and loaded the same, and clear about what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbgad.backbones import create_backbone
from fastbgad.config import FlowConfig
from fastbgad.data import load_sample
from fastbgad.errors import CheckpointError, FeatureError, OutputError
from fastbgad.evaluate.evaluation import evaluate_model
from fastbgad.model import BGAD
from fastbgad.model.scoring import calibrate
from fastbgad.system.checkpoint import load_checkpoint, save_checkpoint
from fastbgad.train.fit import fit
from tests.models import SIZE, tiny_config, tiny_model, tiny_split


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    split = tiny_split(tmp_path_factory.mktemp("data"))
    config = tiny_config()
    model = tiny_model(config)
    fit(model, split, config)
    return model, split


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(90, 130, (3, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_prediction(trained, images) -> None:
    model, _ = trained
    prediction = model.predict(images)
    assert prediction.anomaly_map.shape == prediction.decision.shape == (3, SIZE, SIZE)
    assert [lp.shape for lp in prediction.log_likelihoods] == [(3, 16, 16), (3, 8, 8), (3, 4, 4)]
    assert torch.equal(prediction.image_score, prediction.anomaly_map.amax(dim=(1, 2)))
    b_n, b_a = model.thresholds()
    assert torch.equal(prediction.decision == 2, prediction.anomaly_map > b_a)
    assert torch.equal(prediction.decision == 0, prediction.anomaly_map <= b_n)
    reference = model.predict(images, impl="reference")
    assert torch.allclose(prediction.anomaly_map, reference.anomaly_map, atol=1e-5)


def test_an_image_scores_the_same_alone_or_in_a_batch(trained, images) -> None:
    model, _ = trained
    together = model.predict(images).anomaly_map
    for i in range(len(images)):
        assert torch.allclose(model.predict(images[i : i + 1]).anomaly_map[0], together[i], atol=1e-5)
    assert torch.allclose(model.predict(images.float() / 255).anomaly_map, together, atol=1e-5)


def test_boundaries_rest_on_the_training_normals(trained) -> None:
    """A share beta of the training normals' patches lies on the far side of b_n, level by level."""
    model, split = trained
    pictures = torch.stack([load_sample(s, (SIZE, SIZE)).image for s in split.normals])
    prediction = model.predict(pictures)
    for level, lp in enumerate(prediction.log_likelihoods):
        below = int((lp / 10 < model.boundaries[level, 0] - 1e-6).sum())
        assert abs(below - int(lp.numel() * 0.01)) <= 1


def test_it_finds_the_bright_rectangles(trained) -> None:
    model, split = trained
    evaluation = evaluate_model(model, split.test)
    assert evaluation.metrics.pixel_auroc > 0.9
    assert evaluation.metrics.n_images == len(split.test)
    official = evaluate_model(model, split.test, calibration="official")
    assert torch.equal(official.decisions, evaluation.decisions)
    assert not torch.equal(official.maps, evaluation.maps)


def test_save_and_load(trained, images, tmp_path: Path) -> None:
    model, _ = trained
    model.save(tmp_path / "m.safetensors", {"note": 1})
    loaded = BGAD.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.predict(images).anomaly_map, model.predict(images).anomaly_map)
    assert loaded.history == {"note": 1}
    assert loaded.architecture() == model.architecture()


def test_a_timm_model_loads_without_a_hub(tmp_path: Path) -> None:
    """The backbone's weights travel in the checkpoint."""
    backbone = create_backbone("resnet18", (1, 2), weights="random", seed=3, standardize="none")
    model = BGAD(backbone, (64, 64), flow=FlowConfig(coupling_layers=1))
    picture = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8)
    levels = model(picture)
    model.set_calibration(calibrate([lp.detach() for lp in levels], (64, 64), beta=0.01, tau=0.1, normalizer=10.0))
    model.save(tmp_path / "m.safetensors")
    loaded = BGAD.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.predict(picture).anomaly_map, model.predict(picture).anomaly_map)


def test_what_predict_refuses(trained, images) -> None:
    model, _ = trained
    with pytest.raises(FeatureError, match="resize them"):
        model.predict(images[:, :, :-8])
    with pytest.raises(FeatureError, match="no calibration"):
        tiny_model(tiny_config()).predict(images)
    with pytest.raises(FeatureError, match="no calibration"):
        tiny_model(tiny_config()).save("nowhere.safetensors")


def test_not_finite_log_likelihoods_are_never_scored(trained, images, tmp_path: Path) -> None:
    model, _ = trained
    model.save(tmp_path / "m.safetensors")
    for value in (float("nan"), float("inf")):
        broken = BGAD.load(tmp_path / "m.safetensors")
        with torch.no_grad():
            broken.flow(1).module_list[0].global_offset[0, 0] = value
        with pytest.raises(FeatureError, match="NaN or Inf"):
            broken.predict(images)


def test_checkpoints_that_do_not_fit(trained, tmp_path: Path) -> None:
    model, _ = trained
    path = tmp_path / "m.safetensors"
    model.save(path)
    tensors, metadata = load_checkpoint(path, "model")
    other = {**metadata["architecture"], "flow": {**metadata["architecture"]["flow"], "coupling_layers": 3}}
    save_checkpoint(path, "model", tensors, {"architecture": other})
    with pytest.raises(CheckpointError, match="do not fit the architecture"):
        BGAD.load(path)
    other = {**metadata["architecture"], "backbone": {"name": "no_such_net"}}
    save_checkpoint(path, "model", tensors, {"architecture": other})
    with pytest.raises(CheckpointError, match="cannot build"):
        BGAD.load(path)
    save_checkpoint(path, "training", tensors, {})
    with pytest.raises(CheckpointError, match="training checkpoint"):
        BGAD.load(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        model.save(tmp_path / "file" / "m.safetensors")
