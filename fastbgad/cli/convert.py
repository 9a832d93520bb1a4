"""`fastbgad convert`: models from checkpoints of other code, and back."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..config import LossConfig
from ..convert.conversion import ReadOptions, Target, convert
from ..data import Sample
from ..render import console
from ..system.environment import choose_device
from .opening import open_with_bar
from .options import Check, FileOptions, Layout


@dataclass(frozen=True)
class Convert:
    """Convert a checkpoint of the official BGAD, of CFLOW-AD or of anomalib's Cflow to a model of fastbgad, and back.

    The format, backbone, levels and flow shape are inferred from the tensors. No code in the checkpoint is run, and
    nothing is downloaded.

    For example:

    fastbgad convert official.pt screw.safetensors --data mvtec --category screw

    fastbgad convert cflow.ckpt model.safetensors

    fastbgad convert model.safetensors official.pt --to bgad

    A checkpoint of other code has no calibration. --data calibrates the model on a dataset's normal training images.
    Without it `fastbgad evaluate --calibration official` scores as the other code does, and `fastbgad predict` fails.
    """

    source: tyro.conf.Positional[Path]
    """Checkpoint (.pt, .ckpt) or model.safetensors to read."""
    out: tyro.conf.Positional[Path]
    """File to write: .safetensors for a model of fastbgad, .pt or .ckpt for a checkpoint of other code."""
    to: Target | None = None
    """What to write: fastbgad, bgad (official), cflow-ad or anomalib. If left out: a model of fastbgad from a
    checkpoint; from a model what it once was, anomalib's for .ckpt, else the official BGAD's."""
    data: Path | None = None
    """Folder of the dataset or of one category whose normal training images the model is calibrated on."""
    category: str | None = None
    """Name of the category; may be left out where there is only one."""
    layout: Layout = "auto"
    """How the folders are laid out."""
    check: Check = "full"
    """How thoroughly the dataset is checked first."""
    beta: float = LossConfig.beta
    """Of the calibration: the boundary is this fraction's percentile of the normal log-likelihoods."""
    tau: float = LossConfig.tau
    """Of the calibration: margin between the normal and the anomalous boundary."""
    force: bool = False
    """Overwrite OUT."""
    device: str = "auto"
    """Where the calibration runs: auto, cpu, cuda or cuda:N."""
    workers: int = 2
    """Threads that decode images."""
    files: Annotated[FileOptions, tyro.conf.arg(name="")] = field(default_factory=FileOptions)
    reading: Annotated[ReadOptions, tyro.conf.arg(name="")] = field(default_factory=ReadOptions)

    def run(self) -> int:
        """Convert the file and print what it holds; return the exit code."""
        normals: tuple[Sample, ...] = ()
        if self.data is not None:
            normals = open_with_bar(self.data, self.category, self.layout, self.check, self.files).train
        with console.image_bar("calibration", len(normals)) if normals else nullcontext() as on_images:
            conversion = convert(
                self.source,
                self.out,
                self.to,
                self.reading,
                normals=normals,
                beta=self.beta,
                tau=self.tau,
                force=self.force,
                device=choose_device(self.device),
                workers=self.workers,
                on_images=on_images,
            )
        console.print_facts(conversion.facts)
        for note in conversion.notes:
            print(f"note: {note}")
        return 0
