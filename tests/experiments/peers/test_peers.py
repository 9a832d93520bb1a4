"""Methods of other authors: scores of the right images in the right order, nothing leaked, nothing left behind."""

from __future__ import annotations

import copy
import functools
import os
import random
import signal
import subprocess
import sys
import types
import urllib.error
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

pytest.importorskip("anomalib")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import anomalib.models.image.draem.torch_model as draem_module
    from anomalib.models import Cflow

import fastbgad
from fastbgad.backbones.weights import load_weights
from fastbgad.data import Category, Split, load_sample
from fastbgad.errors import BackboneError, BackendError, CheckpointError, ConfigError, DataError, FeatureError
from fastbgad.experiments.peers import cflow_ad
from fastbgad.experiments.peers import engine as peer_engine
from fastbgad.experiments.peers.data import SplitData
from fastbgad.experiments.peers.peers import PeerScores, run_peer
from fastbgad.experiments.peers.recipes import RECIPES, recipe_of
from fastbgad.experiments.plan.cells import PEERS, Cell
from fastbgad.experiments.plan.setup import Setup
from tests import ROOT
from tests.make_data import make_mvtec, normal_image, save

SIZE = (64, 64)
SETUP = Setup(backbone="gabor", weights="random", image_size=SIZE)
CPU = torch.device("cpu")


class Data(NamedTuple):
    category: Category
    split: Split


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    root = tmp_path_factory.mktemp("mvtec")
    make_mvtec(root, normals=6, per_type=3, size=SIZE[0])
    category = fastbgad.open_category(root, "widget")
    return Data(category, fastbgad.split_known_anomalies(category, 2))


@pytest.fixture(autouse=True)
def _small_draem(monkeypatch: pytest.MonkeyPatch) -> None:
    """DRAEM's networks have 97 million parameters, too many to train in a test."""
    for name in ("ReconstructiveSubNetwork", "DiscriminativeSubNetwork"):
        network = functools.partial(getattr(draem_module, name), base_width=4)
        monkeypatch.setattr(draem_module, name, network)


def cell(method: str, seed: int = 0, **options: int | str) -> Cell:
    """Several batches, and the smallest backbone."""
    small: dict[str, int | str] = {"batch_size": 4, "epochs": 2 if method == "cfa" else 1}
    if method != "draem":
        small["backbone"] = "resnet18"
    overrides = {f"peer.{name}": value for name, value in {**small, **options}.items()}
    return Cell("mvtec", "widget", method, seed=seed, overrides=tuple(sorted(overrides.items())))


def setup_of(method: str) -> Setup:
    """Images of 64 x 64 pixels, too few for SuperSimpleNet's noise alone."""
    return replace(SETUP, image_size=(96, 96)) if method == "supersimplenet" else SETUP


def run(data: Data, of: Cell, setup: Setup = SETUP, split: Split | None = None, **options: Any) -> PeerScores:
    return run_peer(of, data.category, split or data.split, setup, CPU, workers=0, **options)


def reseed(seed: int) -> None:
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(seed)


def random_states() -> list[str]:
    return [repr(random.getstate()), repr(np.random.get_state()), repr(torch.get_rng_state().tolist())]  # noqa: NPY002


# ---------------------------------------------------------------- scores


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
    monkeypatch.setattr(peer_engine, "train_and_score", lambda job, split: (maps, torch.rand(6), {}))
    found = run(data, cell("padim")).maps
    assert torch.equal(found, interpolate(maps[:, None], SIZE, mode="bilinear", align_corners=False)[:, 0])


# ---------------------------------------------------------------- what a peer sees


@pytest.mark.parametrize("method", ["cfa", "cflow_ad"])
def test_training_reads_the_training_images_alone(data: Data, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_image, fit, predict = fastbgad.data.loading.read_image, peer_engine.Engine.fit, peer_engine.Engine.predict

    def note_image(path: Path) -> Any:
        read.append(str(path))
        return read_image(path)

    def note(what: str, function: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            read.append(what)
            return function(*args, **options)

        return noted

    monkeypatch.setattr(fastbgad.data.loading, "read_image", note_image)
    monkeypatch.setattr(fastbgad.data.loading, "read_mask", lambda path: pytest.fail(f"{path} was read"))
    monkeypatch.setattr(peer_engine.Engine, "fit", note("fit", fit))
    monkeypatch.setattr(peer_engine.Engine, "predict", note("predict", predict))
    run(data, cell(method, epochs=3))
    normals, test = ([str(sample.image) for sample in part] for part in (data.split.normals, data.split.test))
    assert read == ["fit", *normals, "predict", *test]  # each once, the known anomalies never


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


def test_cfa_centres_are_those_of_normalised_images(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and centres must see the same images: anomalib's own pre-processor would skip the second."""
    means: dict[str, list[float]] = {"centres": [], "training": []}
    model = peer_engine.cfa_module.CfaModel
    initialise, forward = model.initialize_centroid, model.forward

    def centres(self: Any, data_loader: Any) -> None:
        means["centres"] += [float(batch.image.mean()) for batch in data_loader]
        initialise(self, data_loader)

    def training(self: Any, images: Tensor) -> Any:
        if self.training:
            means["training"].append(float(images.mean()))
        return forward(self, images)

    monkeypatch.setattr(model, "initialize_centroid", centres)
    monkeypatch.setattr(model, "forward", training)
    run(data, cell("cfa", epochs=1, batch_size=6))
    assert means["centres"] == pytest.approx(means["training"], rel=1e-4)
    assert abs(means["centres"][0]) < 0.35  # grey 110 of 255, normalised; 0.43 if it were not


def test_draem_pastes_textures(data: Data, tmp_path: Path) -> None:
    assert run(data, cell("draem")).facts["anomaly_source"] == "noise"
    with pytest.raises(DataError, match="does not exist"):
        run(data, cell("draem"), anomaly_source=tmp_path / "nowhere")
    (tmp_path / "dtd").mkdir()
    with pytest.raises(DataError, match="holds no textures"):
        run(data, cell("draem"), anomaly_source=tmp_path / "dtd")
    save(tmp_path / "dtd" / "spots" / "one.png", normal_image(np.random.default_rng(0)))
    assert run(data, cell("draem"), anomaly_source=tmp_path / "dtd").facts["anomaly_source"] == "dtd"


def test_patchcore_selects_the_patches_that_anomalib_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection in memory that is used again has the same distances to the bit, hence the same patches."""
    sampler = peer_engine.coreset_module.KCenterGreedy
    features = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))

    def selected() -> tuple[list[int], Tensor]:
        reseed(3)
        one = sampler(embedding=features, sampling_ratio=0.2)
        return one.select_coreset_idxs(), one.min_distances

    places, distances = selected()
    monkeypatch.setattr(sampler, "update_distances", peer_engine._update_distances)
    again, same = selected()
    assert again == places
    assert torch.equal(same, distances)


# ---------------------------------------------------------------- CFLOW-AD


def test_cflow_ad_scores_all_batches_alike() -> None:
    """Recorded in two batches it gives the maps that anomalib gives of one batch; anomalib's own two do not compare."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Cflow("resnet18", pre_trained=False, coupling_blocks=2, visualizer=False)
    for decoder in model.model.decoders:
        for block in decoder.module_list:
            nn.init.normal_(block.global_offset, std=0.3)
    original = copy.deepcopy(model).model.eval()
    images = torch.rand(5, 3, *SIZE) * torch.linspace(0.2, 2, 5).view(5, 1, 1, 1)
    expected = original(images).anomaly_map

    recorder = cflow_ad.prepare(model, SIZE, batch_size=5)
    model.eval()
    for part in images.split(3):
        assert model.model(part).anomaly_map.shape == (len(part), *SIZE)
    tolerance = 1e-4 * float(expected.max())
    torch.testing.assert_close(recorder.maps(SIZE), expected, rtol=0, atol=tolerance)
    apart = torch.cat([original(part).anomaly_map for part in images.split(3)])
    assert (apart - expected).abs().max() > 100 * tolerance


def test_cflow_ad_takes_as_many_patches_as_there_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Cflow("resnet18", pre_trained=False, coupling_blocks=1, visualizer=False)
    cflow_ad.prepare(model, (70, 64), batch_size=4)
    assert model.model.fiber_batch_size == 4 * 3 * 2  # layer4 has a cell for every 32 pixels
    assert all(isinstance(flow, fastbgad.compat.freia.acceleration.AcceleratedFlow) for flow in model.model.decoders)


# ---------------------------------------------------------------- the process around it


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_one_process_among_several(data: Data, launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process runs cells of its own, and Lightning must not look for the others."""
    expected = run(data, cell("padim")).maps
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "tables", "SLURM_JOB_ID": "7", "SLURM_PROCID": "1"}
    for name, value in (torchrun if launcher == "torchrun" else slurm).items():
        monkeypatch.setenv(name, value)
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGUSR1)
    assert torch.equal(run(data, cell("padim")).maps, expected)
    assert dict(os.environ) == environment
    assert signal.getsignal(signal.SIGUSR1) == handler


def test_the_device_is_the_one_asked_for(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    asked: dict[str, Any] = {}

    def engine(**options: Any) -> Any:
        asked.update(options)
        raise Stop

    monkeypatch.setattr(peer_engine, "Engine", engine)
    second = torch.device("cuda", 1)
    with pytest.raises(Stop):
        peer_engine.train_and_score(
            peer_engine.Job("padim", RECIPES["padim"], False, SIZE, second, 0, None), data.split
        )
    assert asked["accelerator"] == "gpu"
    assert asked["strategy"].root_device == second


def test_ctrl_c_is_ctrl_c(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, *args: Any) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(peer_engine.Padim, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(data, cell("padim"))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_request_to_terminate_is_not_forgotten(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    predict_step = peer_engine.Padim.predict_step

    def terminated(self: Any, *args: Any, **options: Any) -> Any:
        if not received:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict_step(self, *args, **options)

    monkeypatch.setattr(peer_engine.Padim, "predict_step", terminated)
    monkeypatch.setattr(signal, "raise_signal", received.append)
    run(data, cell("padim"))
    assert received == [signal.SIGTERM]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("method", ["padim", "patchcore", "cflow_ad"])
def test_weights_that_cannot_be_had(data: Data, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> dict[str, Any]:
        raise BackboneError(f"cannot get {name} (no route to host); use --weights FILE")

    monkeypatch.setattr(peer_engine, "hub_overlay", unreachable)
    with pytest.raises(BackboneError, match=rf"{PEERS[method]} .*no route to host.*run it once .*--weights random"):
        run(data, cell(method, backbone="resnet18"), replace(SETUP, weights="pretrained"))


def test_weights_of_torchvision_that_cannot_be_had(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(request: Any, timeout: float) -> None:
        assert "resnet18" in request.full_url
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(BackboneError, match=r"CFA .*no route to host.*--weights random"):
        run(data, cell("cfa"), replace(SETUP, weights="pretrained"))


@pytest.mark.parametrize(
    ("weights", "pretrained"), [("pretrained", True), ("file.pth", True), ("package", True), ("random", False)]
)
def test_pretrained_weights_are_asked_for(
    data: Data, weights: str, pretrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    padim = peer_engine.Padim

    def build(pre_trained: bool, **options: Any) -> Any:
        asked.append(pre_trained)
        return padim(pre_trained=False, **options)

    monkeypatch.setattr(peer_engine, "hub_overlay", lambda name: {})
    monkeypatch.setattr(peer_engine, "Padim", build)
    scores = run(data, cell("padim"), replace(SETUP, weights=weights))
    assert asked == [pretrained]
    assert scores.facts["weights"] == ("pretrained" if pretrained else "random")


@pytest.mark.parametrize(("method", "backbone"), [("padim", "resnet0"), ("cfa", "resnet50"), ("patchcore", "vgg")])
def test_backbones_that_do_not_suit(data: Data, method: str, backbone: str) -> None:
    with pytest.raises(BackboneError, match=rf"build {PEERS[method]} on {backbone} .*choose another peer.backbone"):
        run(data, cell(method, backbone=backbone))


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


def test_every_peer_has_a_recipe() -> None:
    assert set(RECIPES) == set(PEERS)
    assert recipe_of(Cell("mvtec", "widget", "draem")).epochs == 700
    assert recipe_of(cell("patchcore")).backbone == "resnet18"


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
from fastbgad.experiments.cells import Cell
from fastbgad.experiments.peers import run_peer
from fastbgad.experiments.setup import Setup
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
