"""fastbgad: boundary-guided anomaly detection (BGAD, CVPR 2023), fast and checked against a float64 reference.

    import fastbgad

    category = fastbgad.open_category("mvtec", "screw")
    split = fastbgad.split_known_anomalies(category, num_anomalies=10)
    model = fastbgad.BGAD(fastbgad.create_backbone("tf_efficientnet_b6.aa_in1k"))
    fastbgad.fit(model, split, fastbgad.TrainConfig(), run_dir="runs/screw")
    print(fastbgad.evaluate_model(model, split.test).metrics)

`fastbgad.ops` has the operations, `fastbgad.reference` the reference that they are tested against.
"""

from __future__ import annotations

from .backbones import Backbone, create_backbone
from .compat.freia import accelerate, restore
from .config import (
    AnomalyConfig,
    FlowConfig,
    LossConfig,
    ScheduleConfig,
    ScoreConfig,
    TrainConfig,
    demo_preset,
    short_preset,
)
from .convert import Conversion, ReadOptions, convert
from .data import Category, Sample, Split, open_category, split_known_anomalies
from .data.layouts import FileOptions
from .errors import FastBGADError, Notice
from .evaluate import Evaluation, Metrics, aupro, auroc, evaluate_model, official_pro
from .export import ExportSummary, export_detector
from .features import ImageFeatures
from .flow_spec import CouplingWeights, FlowSpec
from .model import BGAD, Calibration, ConditionalFlow, Prediction, calibrate_model
from .ops import FlowOutput, PositionalRows
from .ops.positional_tensor import PositionalEncoding, positional_rows
from .predict import PredictionSummary, find_images, predict_files
from .progress import Progress
from .train import DataParallel, FitResult, InterruptedTraining, fit

__all__ = [
    "BGAD",
    "AnomalyConfig",
    "Backbone",
    "Calibration",
    "Category",
    "ConditionalFlow",
    "Conversion",
    "CouplingWeights",
    "DataParallel",
    "Evaluation",
    "ExportSummary",
    "FastBGADError",
    "FileOptions",
    "FitResult",
    "FlowConfig",
    "FlowOutput",
    "FlowSpec",
    "ImageFeatures",
    "InterruptedTraining",
    "LossConfig",
    "Metrics",
    "Notice",
    "PositionalEncoding",
    "PositionalRows",
    "Prediction",
    "PredictionSummary",
    "Progress",
    "ReadOptions",
    "Sample",
    "ScheduleConfig",
    "ScoreConfig",
    "Split",
    "TrainConfig",
    "accelerate",
    "aupro",
    "auroc",
    "calibrate_model",
    "convert",
    "create_backbone",
    "demo_preset",
    "evaluate_model",
    "export_detector",
    "find_images",
    "fit",
    "official_pro",
    "open_category",
    "positional_rows",
    "predict_files",
    "restore",
    "short_preset",
    "split_known_anomalies",
]
