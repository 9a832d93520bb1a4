"""A small category and cells of small trainings, for the tests of methods of other authors."""

from __future__ import annotations

import functools
import importlib.util
import random
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import fastbgad
from fastbgad.data import Category, Split
from fastbgad.experiments.peers.peers import PeerScores, run_peer
from fastbgad.experiments.plan.cells import Cell
from fastbgad.experiments.plan.setup import Setup
from tests.make_data import make_mvtec

SIZE = (64, 64)
SETUP = Setup(backbone="gabor", weights="random", image_size=SIZE)
CPU = torch.device("cpu")


class Data(NamedTuple):
    category: Category
    split: Split


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    root = tmp_path_factory.mktemp("mvtec")
    make_mvtec(root, normals=6, per_type=3, size=SIZE[0])
    category = fastbgad.open_category(root, "widget")
    return Data(category, fastbgad.split_known_anomalies(category, 2))


@pytest.fixture(autouse=True)
def _small_draem(monkeypatch: pytest.MonkeyPatch) -> None:
    """DRAEM's networks have 97 million parameters, too many to train in a test."""
    if importlib.util.find_spec("anomalib") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import anomalib.models.image.draem.torch_model as draem_module
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
