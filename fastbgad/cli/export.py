"""`fastbgad export`: a trained model as one file that runs without fastbgad."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..export import ExportFormat, export_detector
from ..model.detector import BGAD
from ..render import console


@dataclass(frozen=True)
class Export:
    """Write a trained model as one file that runs without fastbgad, and check that it computes the same.

    For example:

    fastbgad export --model runs/screw/model.safetensors --out screw.onnx

    fastbgad export --model runs/screw/model.safetensors --out screw.pt2 --format torch-export

    fastbgad export --model runs/screw/model.safetensors --out screw.pt2 --format aoti --device cuda

    The file takes batches of any number of images, [B, 3, H, W] float32, RGB in [0, 1], of the size that the model was
    trained at, and returns anomaly_map, image_score, image_side, decision and the log-likelihoods of every level.
    Thresholds and image size are stored as metadata. The file is first loaded, run on generated images and compared
    with the model; if it differs, nothing is written.
    """

    model: Path
    """A model.safetensors that train wrote."""
    out: Path
    """File to write: .onnx, or .pt2 for the formats torch-export and aoti; an existing file is replaced."""
    format: ExportFormat = "onnx"
    """onnx: for ONNX Runtime and others (needs fastbgad[export]); torch-export: for PyTorch, on any machine; aoti:
    compiled for machines like this one, for PyTorch in Python or C++ (needs a C++ compiler and a minute or more)."""
    device: str = "cpu"
    """Where a torch-export or aoti file will run: cpu, cuda or cuda:N. An ONNX file is bound to no device."""

    def run(self) -> int:
        """Export the model and print what was written; return the exit code."""
        model = BGAD.load(self.model)
        summary = export_detector(model, self.out, self.format, device=self.device)
        console.print_facts(summary.facts())
        return 0
