"""A tiny detector, dataset and schedule that train in a second; several test files use them."""

from __future__ import annotations

from pathlib import Path

from fastbgad.backbones import create_backbone
from fastbgad.config import AnomalyConfig, FlowConfig, LossConfig, Method, ScheduleConfig, TrainConfig
from fastbgad.data import Split, open_category, split_known_anomalies
from fastbgad.model import BGAD
from tests.make_data import make_mvtec

SIZE = 64


def tiny_config(method: Method = "bgad", **schedule: object) -> TrainConfig:
    options: dict = {"meta_epochs": 2, "sub_epochs": 2, "batch_size": 3, "lr": 2e-3, "warmup_epochs": 1}
    return TrainConfig(
        method=method,
        flow=FlowConfig(coupling_layers=2, condition_channels=16),
        loss=LossConfig(focal=False),
        schedule=ScheduleConfig(**{**options, "chunk_rows": 200, **schedule}),
        anomalies=AnomalyConfig(num_anomalies=2, repeat=1, cut_paste=2, refresh=1),
    )


def tiny_model(config: TrainConfig) -> BGAD:
    return BGAD(create_backbone("gabor"), (SIZE, SIZE), flow=config.flow, seed=config.seed)


def tiny_split(root: Path, num_anomalies: int = 2, seed: int = 0) -> Split:
    make_mvtec(root, normals=5, per_type=3, size=SIZE, seed=seed)
    return split_known_anomalies(open_category(root), num_anomalies)
