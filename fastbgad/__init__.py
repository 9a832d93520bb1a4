"""fastbgad: boundary-guided anomaly detection (BGAD, CVPR 2023), fast and checked against a float64 oracle.

    import fastbgad

    category = fastbgad.open_category("mvtec", "screw")
    split = fastbgad.split_known_anomalies(category, num_anomalies=10)
    model = fastbgad.BGAD(fastbgad.create_backbone("tf_efficientnet_b6.aa_in1k"))
    fastbgad.fit(model, split, fastbgad.TrainConfig(), run_dir="runs/screw")
    print(fastbgad.evaluate_model(model, split.test).metrics)

`fastbgad.ops` has the operations, `fastbgad.reference` the oracle.
"""

from __future__ import annotations

from .backbones import Backbone, create_backbone
from .compat.freia import accelerate, restore
from .config import TrainConfig, demo_preset
from .data import Category, Sample, Split, open_category, split_known_anomalies
from .errors import FastBGADError
from .evaluate.evaluation import Evaluation, evaluate_model
from .evaluate.metrics import aupro, auroc, official_pro
from .flow_spec import CouplingWeights, FlowSpec
from .model.detector import BGAD, Prediction
from .model.flow import ConditionalFlow
from .ops import PositionalRows
from .ops.positional_tensor import positional_rows
from .predict.local import find_images, predict_files
from .train.fit import fit

__all__ = [
    "BGAD",
    "Backbone",
    "Category",
    "ConditionalFlow",
    "CouplingWeights",
    "Evaluation",
    "FastBGADError",
    "FlowSpec",
    "PositionalRows",
    "Prediction",
    "Sample",
    "Split",
    "TrainConfig",
    "accelerate",
    "aupro",
    "auroc",
    "create_backbone",
    "demo_preset",
    "evaluate_model",
    "find_images",
    "fit",
    "official_pro",
    "open_category",
    "positional_rows",
    "predict_files",
    "restore",
    "split_known_anomalies",
]
