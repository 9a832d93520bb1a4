"""Training: it learns, resumes to the bit, stops cleanly, and refuses what does not fit."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastbgad.backbones import create_backbone
from fastbgad.config import FlowConfig, ScoreConfig
from fastbgad.data import Split, load_sample
from fastbgad.errors import CheckpointError, ConfigError, DataError, FeatureError, Notice
from fastbgad.model import BGAD
from fastbgad.progress import Progress
from fastbgad.reference import upsample_bilinear
from fastbgad.system.checkpoint import load_checkpoint, save_checkpoint
from fastbgad.train import LOG_FILE, MODEL_FILE, STATE_FILE, InterruptedTraining, fit
from tests.models import SIZE, tiny_config, tiny_model, tiny_split

METHODS = ["nfad", "bgad_without", "bgad_dagger", "bgad"]


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return tiny_split(tmp_path / "data")


def same(a: BGAD, b: BGAD) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(split: Split, method: str) -> None:
    config = tiny_config(method, meta_epochs=6)
    model = tiny_model(config)
    before = [parameter.clone() for parameter in model.flows.parameters()]
    result = fit(model, split, config)
    assert len(result.history) == 12
    # Standardized features of noise start near the unit Gaussian: there is little likelihood to gain.
    assert result.history[1]["loss_ml"] < result.history[0]["loss_ml"] - 0.001
    if method in ("bgad", "bgad_dagger"):
        assert result.history[-1]["loss"] < result.history[2]["loss"]
    else:
        assert result.history[-1]["loss_ml"] < result.history[0]["loss_ml"] - 0.02
    if method == "bgad":
        assert result.history[-1]["loss_a"] < 0.8 * result.history[2]["loss_a"]
    assert all(record["loss_n"] == record["loss_a"] == 0 for record in result.history[:2])  # phase one
    later = result.history[2:]
    assert all((record["loss_n"] > 0) == (method != "nfad") for record in later)
    assert all((record["loss_a"] > 0) == (method in ("bgad", "bgad_dagger")) for record in later)
    # no level sits out: every trainable tensor of every level moved, the rotations did not
    for parameter, old in zip(model.flows.parameters(), before, strict=True):
        assert torch.equal(parameter, old) != parameter.requires_grad
    assert model.calibrated
    assert (model.boundaries[:, 1] < model.boundaries[:, 0]).all()


def test_same_seed_same_bits(split: Split) -> None:
    models = []
    for seed in (0, 0, 1):
        config = replace(tiny_config(), seed=seed)
        model = tiny_model(config)
        fit(model, split, config)
        models.append(model)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


@pytest.mark.parametrize("stop_after", [1, 4, 7, 9])
def test_resume_after_ctrl_c_is_bit_exact(split: Split, tmp_path: Path, stop_after: int) -> None:
    """Ctrl-C in phase one, between phases and in phase two; the log and the weights end as if nothing had happened."""
    config = tiny_config()
    straight = tiny_model(config)
    whole = fit(straight, split, config, run_dir=tmp_path / "straight")

    batches = 0

    def interrupt(progress: Progress) -> None:
        nonlocal batches
        batches += progress.stage == "training"
        if batches == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedTraining, match="--resume"):
        fit(tiny_model(config), split, config, run_dir=tmp_path / "run", on_progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run" / MODEL_FILE).exists()

    resumed = tiny_model(config)
    result = fit(resumed, split, config, run_dir=tmp_path / "run", resume=True)
    assert same(straight, resumed)
    for ours, theirs in zip(result.history, whole.history, strict=True):
        assert {k: v for k, v in ours.items() if k != "images_per_second"} == {
            k: v for k, v in theirs.items() if k != "images_per_second"
        }
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG_FILE).read_text().splitlines()]
    assert lines == result.history
    assert same(BGAD.load(tmp_path / "run" / MODEL_FILE), straight)


def test_resume_of_a_finished_run_trains_no_more(split: Split, tmp_path: Path) -> None:
    config = tiny_config("nfad")
    first = tiny_model(config)
    fit(first, split, config, run_dir=tmp_path / "run")
    stages = set()
    again = tiny_model(config)
    fit(again, split, config, run_dir=tmp_path / "run", resume=True, on_progress=lambda p: stages.add(p.stage))
    assert "training" not in stages
    assert same(first, again)


def test_a_run_is_never_overwritten_or_mixed_up(split: Split, tmp_path: Path) -> None:
    config, run_dir = tiny_config("nfad"), tmp_path / "run"
    fit(tiny_model(config), split, config, run_dir=run_dir)
    with pytest.raises(ConfigError, match="already holds a run"):
        fit(tiny_model(config), split, config, run_dir=run_dir)
    other = replace(config, seed=1)
    with pytest.raises(CheckpointError, match="differs in training"):
        fit(tiny_model(config), split, other, run_dir=run_dir, resume=True)
    deeper = replace(config, flow=FlowConfig(coupling_layers=3, condition_channels=16))
    with pytest.raises(CheckpointError, match="differs in architecture"):
        fit(tiny_model(deeper), split, deeper, run_dir=run_dir, resume=True)
    fewer = Split(split.normals[:-1], split.known_anomalies, split.test)
    with pytest.raises(CheckpointError, match="normals"):
        fit(tiny_model(config), fewer, config, run_dir=run_dir, resume=True)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        fit(tiny_model(config), split, config, run_dir=tmp_path / "empty", resume=True)


def test_images_of_another_lot_do_not_resume_a_run(tmp_path: Path) -> None:
    """Their names are the same."""
    config, run_dir = tiny_config("bgad"), tmp_path / "run"
    first, other = tiny_split(tmp_path / "first"), tiny_split(tmp_path / "other", seed=5)
    fit(tiny_model(config), first, config, run_dir=run_dir)
    assert [s.name for s in first.known_anomalies] == [s.name for s in other.known_anomalies]
    with pytest.raises(CheckpointError, match="content of the normal images, content of the known anomalies;"):
        fit(tiny_model(config), other, config, run_dir=run_dir, resume=True)
    mixed = replace(other, normals=first.normals)
    with pytest.raises(CheckpointError, match="differs in content of the known anomalies;"):
        fit(tiny_model(config), mixed, config, run_dir=run_dir, resume=True)


def test_states_of_earlier_versions_resume(split: Split, tmp_path: Path) -> None:
    """They tell nothing of the images' content, and their default number of known anomalies was 10."""
    config, run_dir = tiny_config("bgad"), tmp_path / "run"
    fit(tiny_model(config), split, config, run_dir=run_dir)
    tensors, metadata = load_checkpoint(run_dir / STATE_FILE, "training")
    identity = {name: value for name, value in metadata["identity"].items() if not name.startswith("content of")}
    assert len(identity) == len(metadata["identity"]) - 2
    identity["training"]["anomalies"]["num_anomalies"] = 10
    save_checkpoint(run_dir / STATE_FILE, "training", tensors, {"identity": identity, "place": metadata["place"]})
    config = replace(config, anomalies=replace(config.anomalies, num_anomalies=None))
    fit(tiny_model(config), split, config, run_dir=run_dir, resume=True)
    fewer = replace(split, known_anomalies=split.known_anomalies[:1])
    with pytest.raises(CheckpointError, match="differs in known_anomalies;"):
        fit(tiny_model(config), fewer, config, run_dir=run_dir, resume=True)


def test_a_damaged_state_is_refused(split: Split, tmp_path: Path) -> None:
    config, run_dir = tiny_config("nfad"), tmp_path / "run"
    fit(tiny_model(config), split, config, run_dir=run_dir)
    state = run_dir / STATE_FILE
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        fit(tiny_model(config), split, config, run_dir=run_dir, resume=True)


def test_adam_coasting(split: Split) -> None:
    """Idle levels move only if they coast; with one level's data in every step the two must differ."""
    results = []
    for coasting in (False, True):
        config = tiny_config("nfad", adam_coasting=coasting)
        model = tiny_model(config)
        fit(model, split, config)
        results.append(model)
    assert not same(*results)


def test_what_cannot_be_trained(split: Split) -> None:
    config = tiny_config()
    with pytest.raises(DataError, match="raise num_anomalies"):
        fit(tiny_model(config), Split(split.normals, (), split.test), config)
    with pytest.raises(DataError, match="no normal image"):
        fit(tiny_model(config), Split((), split.known_anomalies, split.test), config)
    with pytest.raises(ConfigError, match="needs run_dir"):
        fit(tiny_model(config), split, config, resume=True)


def test_divergence_is_an_error_and_keeps_the_last_state(split: Split, tmp_path: Path) -> None:
    config = tiny_config("nfad", meta_epochs=3, warmup_epochs=0, lr=1e12)
    with pytest.raises(FeatureError, match="lower the learning rate"):
        fit(tiny_model(config), split, config, run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / MODEL_FILE).exists()


def test_features_with_nan_are_refused(split: Split) -> None:
    config = tiny_config("nfad")
    model = tiny_model(config)
    model.backbone.fit([torch.randint(0, 255, (2, 3, SIZE, SIZE), dtype=torch.uint8)])
    next(iter(model.backbone.buffers())).fill_(float("nan"))
    with pytest.raises(FeatureError, match="NaN or Inf"):
        fit(model, split, config)


def test_what_the_boundary_catches_of_the_known_anomalies(split: Split, tmp_path: Path) -> None:
    """Counted as `predict` decides, kept with the model, and said where the answer is nothing."""
    config = tiny_config("bgad", meta_epochs=4)
    config = replace(config, loss=replace(config.loss, tau=0.01))
    model = tiny_model(config)
    result = fit(model, split, config, run_dir=tmp_path / "run")
    images = torch.stack([load_sample(sample, model.image_size).image for sample in split.known_anomalies])
    side = model.eval().predict(images).image_side
    assert result.known_beyond == {"b_n": int((side >= 1).sum()), "b_a": int((side == 2).sum())}
    assert result.known_beyond["b_n"] > 0
    assert BGAD.load(tmp_path / "run" / MODEL_FILE).history["known_anomalies_beyond"] == result.known_beyond
    # A margin that nothing can cross.
    wide = replace(config, loss=replace(config.loss, tau=10.0))
    with pytest.warns(Notice, match=r"none of the 2 known anomalies.*--loss.tau, now 10"):
        assert fit(tiny_model(wide), split, wide).known_beyond["b_a"] == 0
    assert fit(tiny_model(tiny_config("nfad")), split, tiny_config("nfad")).known_beyond == {}


def test_weights_of_levels_are_part_of_the_calibration(tmp_path: Path) -> None:
    """Training is the same; the map of a level with more channels counts more."""
    split = tiny_split(tmp_path / "data")
    models = []
    for kind in ("channels", "equal"):
        config = replace(tiny_config("nfad"), score=ScoreConfig(kind))
        model = BGAD(create_backbone("resnet18", (1, 2), "random"), (SIZE, SIZE), flow=config.flow)
        fit(model, split, config)
        models.append(model.eval())
    weighted, equal = models
    assert all(torch.equal(a, b) for a, b in zip(weighted.parameters(), equal.parameters(), strict=True))
    assert torch.allclose((equal.level_max - weighted.level_max).exp(), torch.tensor([2 / 3, 4 / 3]))
    images = torch.stack([load_sample(sample, (SIZE, SIZE)).image for sample in split.test])
    likelihoods = [torch.exp(lp - most) for lp, most in zip(equal(images), equal.level_max, strict=True)]
    maps = [upsample_bilinear(each.double(), (SIZE, SIZE)) for each in likelihoods]
    expected = float(weighted.offset) - (2 / 3 * maps[0] + 4 / 3 * maps[1])
    assert torch.allclose(weighted.predict(images).anomaly_map.double(), expected, atol=1e-5)
