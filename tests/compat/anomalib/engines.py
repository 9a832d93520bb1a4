"""Small models of BGAD, engines and datamodules of anomalib."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("anomalib")

from anomalib.data import Folder
from anomalib.engine import Engine

from fastbgad.compat.anomalib import Bgad, KnownAnomalies
from fastbgad.compat.anomalib.training import TrainingFeatures, TrainingImages, only_resizes

SIZE = 64


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


def raw_scores(model: Bgad, predictions: list[Any]) -> tuple[Tensor, Tensor]:
    """Scores and maps before anomalib's post-processing."""
    model.eval()
    with torch.no_grad():
        outputs = [model.model(batch.image) for batch in predictions]
    return torch.cat([o.pred_score for o in outputs]), torch.cat([o.anomaly_map for o in outputs])


def training_features(model: Bgad, datamodule: Any) -> tuple[TrainingFeatures, Any]:
    datamodule.setup()
    assert model.pre_processor is not None
    transform = model.pre_processor.transform
    images = TrainingImages(datamodule.train_dataloader(), transform)
    return TrainingFeatures(model.model.detector, images, model.config, True, only_resizes(transform)), datamodule
