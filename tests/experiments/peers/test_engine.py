"""anomalib's models and its Engine: weights, backbones, devices, processes and signals."""

from __future__ import annotations

import os
import signal
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("anomalib")

from fastbgad.errors import BackboneError, DataError
from fastbgad.experiments.peers import engine as peer_engine
from fastbgad.experiments.peers.recipes import RECIPES
from fastbgad.experiments.plan.cells import PEERS
from tests.experiments.peers.conftest import SETUP, SIZE, Data, cell, reseed, run
from tests.make_data import normal_image, save


def test_cfa_centers_are_those_of_normalized_images(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and centers must see the same images: anomalib's own pre-processor would skip the second."""
    means: dict[str, list[float]] = {"centers": [], "training": []}
    model = peer_engine.cfa_module.CfaModel
    initialize, forward = model.initialize_centroid, model.forward

    def centers(self: Any, data_loader: Any) -> None:
        means["centers"] += [float(batch.image.mean()) for batch in data_loader]
        initialize(self, data_loader)

    def training(self: Any, images: Tensor) -> Any:
        if self.training:
            means["training"].append(float(images.mean()))
        return forward(self, images)

    monkeypatch.setattr(model, "initialize_centroid", centers)
    monkeypatch.setattr(model, "forward", training)
    run(data, cell("cfa", epochs=1, batch_size=6))
    assert means["centers"] == pytest.approx(means["training"], rel=1e-4)
    assert abs(means["centers"][0]) < 0.35  # gray 110 of 255, normalized; 0.43 if it were not


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
            peer_engine.PeerTraining("padim", RECIPES["padim"], False, SIZE, second, 0, None), data.split
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
    # Ray, in a test before this one, leaves a handler that ends the process.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        run(data, cell("padim"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


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
