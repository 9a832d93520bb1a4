"""Methods of other authors: scores of the right images in the right order, nothing leaked, nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn.functional import interpolate, max_pool2d

pytest.importorskip("anomalib")

import fastbgad
from fastbgad.backbones.weights import load_weights
from fastbgad.data import load_sample
from fastbgad.errors import BackendError, CheckpointError, ConfigError, DataError, FeatureError
from fastbgad.experiments.peers import engine as peer_engine
from fastbgad.experiments.peers.recipes import RECIPES
from fastbgad.experiments.plan.cells import PEERS, Cell
from tests import ROOT
from tests.experiments.peers.conftest import SETUP, SIZE, Data, cell, random_states, reseed, run, setup_of


@pytest.mark.parametrize("method", list(PEERS))
def test_scores_in_the_order_of_the_test_images(
    data: Data, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Twice with one seed, the test images turned round: the same scores, and nothing left behind by either run."""
    monkeypatch.chdir(tmp_path)
    reseed(4)  # which does not matter
    environment, states, handlers = dict(os.environ), random_states(), [signal.getsignal(n) for n in (2, 15)]
    setup = setup_of(method)
    scores = run(data, cell(method), setup)
    assert random_states() == states
    reseed(5)
    turned = run(data, cell(method), setup, split=replace(data.split, test=data.split.test[::-1]))
    other = run(data, cell(method, seed=1), setup)

    count = len(data.split.test)
    assert scores.maps.shape == (count, *setup.image_size)
    assert scores.image_scores.shape == (count,)
    assert scores.maps.dtype == scores.image_scores.dtype == torch.float32
    torch.testing.assert_close(turned.maps.flip(0), scores.maps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned.image_scores.flip(0), scores.image_scores, rtol=1e-4, atol=1e-4)
    assert len(scores.image_scores.unique()) == count  # or the order would not show
    assert not torch.allclose(other.maps, scores.maps, rtol=1e-3, atol=1e-4)
    assert scores.facts["weights"] == ("none" if method == "draem" else "random")
    assert scores.facts["training_images"] == 6
    assert scores.facts["epochs"] == (2 if method == "cfa" else 1)

    assert dict(os.environ) == environment
    assert [signal.getsignal(n) for n in (2, 15)] == handlers
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", [method for method in PEERS if method not in ("draem", "supersimplenet")])
def test_an_anomaly_is_found_where_it_is(data: Data, method: str) -> None:
    maps, image_scores, _ = run(data, cell(method))
    masks = torch.stack([load_sample(sample, SIZE).mask for sample in data.split.test])
    near = max_pool2d(masks[:, None].float(), 17, stride=1, padding=8)[:, 0].bool()
    anomalous = torch.tensor([bool(sample.label) for sample in data.split.test])
    for one, where in zip(maps[anomalous], near[anomalous], strict=True):
        assert where.flatten()[one.argmax()]
    assert image_scores[anomalous].min() > image_scores[~anomalous].max()


def test_maps_of_another_size(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.rand(6, 16, 16)
    monkeypatch.setattr(peer_engine, "train_and_score", lambda training, split: (maps, torch.rand(6), {}))
    found = run(data, cell("padim")).maps
    assert torch.equal(found, interpolate(maps[:, None], SIZE, mode="bilinear", align_corners=False)[:, 0])


@pytest.mark.parametrize("method", ["cfa", "cflow_ad"])
def test_training_reads_the_training_images_alone(data: Data, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_image, fit, predict = fastbgad.data.loading.read_image, peer_engine.Engine.fit, peer_engine.Engine.predict

    def note_image(path: Path, *options: Any) -> Any:
        read.append(str(path))
        return read_image(path, *options)

    def note(what: str, function: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            read.append(what)
            return function(*args, **options)

        return noted

    monkeypatch.setattr(fastbgad.data.loading, "read_image", note_image)
    monkeypatch.setattr(fastbgad.data.loading, "read_mask", lambda path, *_: pytest.fail(f"{path} was read"))
    monkeypatch.setattr(peer_engine.Engine, "fit", note("fit", fit))
    monkeypatch.setattr(peer_engine.Engine, "predict", note("predict", predict))
    run(data, cell(method, epochs=3))
    normals, test = ([str(sample.image) for sample in part] for part in (data.split.normals, data.split.test))
    assert read == ["fit", *normals, "predict", *test]  # each once, the known anomalies never


def test_a_supervised_peer_needs_known_anomalies(data: Data) -> None:
    with pytest.raises(DataError, match=r"SuperSimpleNet learns from anomalies, but none of .* is known"):
        run(data, cell("supersimplenet"), setup_of("supersimplenet"), replace(data.split, known_anomalies=()))
    assert Cell("mvtec", "widget", "supersimplenet").learns_from_anomalies


@pytest.mark.parametrize("method", ["padim", "patchcore", "cfa", "supersimplenet"])
def test_given_weights_on_any_timm_backbone(data: Data, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extractor gives the features of the network whose weights were given, of images normalized as it wants."""
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    levels = RECIPES[method].levels
    reference = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=levels).eval()
    load_weights(reference, network.state_dict(), "test", "lite0")
    built: list[Any] = []
    predict = peer_engine.Engine.predict

    def note(self: Any, model: Any, **options: Any) -> Any:
        built.append((model, options["datamodule"]))
        return predict(self, model, **options)

    monkeypatch.setattr(peer_engine.Engine, "predict", note)
    of = cell(method, backbone="tf_efficientnet_lite0", epochs=1)
    setup = setup_of(method)
    scores = run(data, of, setup, state=network.state_dict())
    assert scores.facts["weights"] == "given"
    (model, datamodule) = built[0]
    assert len(datamodule.train_dataloader().dataset) == (12 if method == "supersimplenet" else 6)
    kind = peer_engine._NamedLevels if method == "cfa" else peer_engine.TimmFeatureExtractor
    extractor = next(module for module in model.modules() if isinstance(module, kind))
    batch = next(iter(datamodule.predict_dataloader())).image
    expected = load_sample(data.split.test[0], setup.image_size).image.float() / 127.5 - 1  # mean and deviation 0.5
    torch.testing.assert_close(batch[0], expected)
    with torch.no_grad():
        found, wanted = list(extractor(batch).values()), reference(batch)
    assert len(found) == len(levels)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_given_weights_of_another_network(data: Data) -> None:
    with pytest.raises(CheckpointError, match=r"given as weights of PaDiM lacks .* tensors of resnet18"):
        run(data, cell("padim"), state={"conv1.weight": torch.zeros(3)})


def test_options_and_sizes_that_do_not_suit(data: Data) -> None:
    for of, message in (
        (Cell("mvtec", "widget", "bgad"), "'bgad' is no method of another author"),
        (Cell("mvtec", "widget", "padim", overrides=(("peer.epoch", 1),)), "did you mean peer.epochs"),
        (Cell("mvtec", "widget", "padim", overrides=(("loss.beta", 0.1),)), "PaDiM has no option 'loss.beta'"),
        (cell("padim", epochs=0), "peer.epochs is 0; give a whole number"),
        (cell("padim", batch_size="4"), "peer.batch_size is '4'"),
        (cell("padim", backbone=18), "peer.backbone is 18; give the name"),
        (cell("draem", backbone="resnet18"), "DRAEM has no backbone to choose"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(data, of)
    with pytest.raises(ConfigError, match="64 x 96, but CFA takes square images"):
        run(data, cell("cfa"), replace(SETUP, image_size=(64, 96)))
    with pytest.raises(ConfigError, match="64 x 64, but SuperSimpleNet needs at least 65 pixels"):
        run(data, cell("supersimplenet"))
    with pytest.raises(ConfigError, match="64 x 72, but DRAEM needs multiples of 32"):
        run(data, cell("draem"), replace(SETUP, image_size=(64, 72)))
    with pytest.raises(DataError, match="no image to train PaDiM on"):
        run(data, cell("padim"), split=replace(data.split, normals=()))
    with pytest.raises(DataError, match="no image to test PaDiM on"):
        run(data, cell("padim"), split=replace(data.split, test=()))


def test_scores_that_are_no_numbers(data: Data) -> None:
    with pytest.raises(FeatureError, match="PaDiM gave scores that are NaN or Inf on widget with 1 training images"):
        run(data, cell("padim"), split=replace(data.split, normals=data.split.normals[:1]))


def test_an_image_that_cannot_be_read(data: Data, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    samples = (*data.split.test[:2], data.split.test[2]._replace(image=broken))
    with pytest.raises(DataError, match=r"broken\.png"):
        run(data, cell("padim"), split=replace(data.split, test=samples))


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB"), "needs more memory .* 64 x 64 pixels"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "needs more memory .*peer.batch_size"),
        (IndexError("list index out of range"), "anomalib could not run PaDiM on widget .*IndexError: list index"),
    ],
)
def test_what_anomalib_raises(data: Data, raised: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Any, *args: Any) -> None:
        raise raised

    monkeypatch.setattr(peer_engine.Padim, "training_step", failing)
    states = random_states()
    with pytest.raises(BackendError, match=message) as caught:
        run(data, cell("padim"))
    assert caught.value.__cause__ is raised
    assert random_states() == states


def test_an_import_that_draws_random_numbers(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of anomalib does, through packages of its own."""
    module = types.ModuleType(peer_engine.__name__)

    def attribute(name: str) -> Any:
        random.random()
        return getattr(peer_engine, name)

    monkeypatch.setattr(module, "__getattr__", attribute, raising=False)
    monkeypatch.setitem(sys.modules, peer_engine.__name__, module)
    states = random_states()
    run(data, cell("padim"))
    assert random_states() == states


def test_anomalib_is_imported_when_it_is_needed() -> None:
    code = """
import sys
import torch
from fastbgad.data import Category, Sample, Split
from fastbgad.experiments.peers import run_peer
from fastbgad.experiments.plan import Cell, Setup
from fastbgad.errors import MissingDependencyError
assert "anomalib" not in sys.modules and "lightning" not in sys.modules
sys.modules["anomalib"] = None
sample = (Sample("image.png", None, 0, "good"),)
try:
    run_peer(Cell("mvtec", "widget", "padim"), Category("widget", ".", "mvtec", sample, sample),
             Split(sample, (), sample), Setup(), torch.device("cpu"))
except MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "a method of another author needs the package anomalib: pip install 'fastbgad[peers]'\n"
