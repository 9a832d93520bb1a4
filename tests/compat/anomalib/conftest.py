"""A dataset, and one training run on it, that the tests of BGAD in anomalib share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.make_data import make_folder_dataset

if TYPE_CHECKING:
    from .engines import Run


@pytest.fixture(autouse=True, scope="package")
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


@pytest.fixture(scope="package")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .engines import SIZE

    return make_folder_dataset(tmp_path_factory.mktemp("parts"), normals=14, anomalies=9, size=SIZE)


@pytest.fixture(scope="package")
def run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from fastbgad.compat.anomalib import with_known_anomalies

    from .engines import Run, bgad, engine, folder_data

    torch.manual_seed(0)
    datamodule = with_known_anomalies(folder_data(parts), 3, repeat=2)
    model, trainer = bgad(cut_paste=2, seed=1), engine(tmp_path_factory.mktemp("run"), max_epochs=3)
    (metrics,) = trainer.train(model, datamodule=datamodule)
    return Run(model, datamodule, trainer, metrics, trainer.predict(model, datamodule=datamodule))
