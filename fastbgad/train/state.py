"""The files of a training run: configuration, log, state and trained model. The state resumes a run bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..data import Split
from ..data.content import content_digest
from ..errors import CheckpointError, ConfigError
from ..model.detector import BGAD
from ..ops.dispatch import resolve_matmul_precision
from ..progress import Record
from ..system.checkpoint import load_checkpoint, save_checkpoint
from ..system.files import make_folder, write_json, write_text
from .level import LevelTrainer

STATE_FILE = "training.safetensors"
MODEL_FILE = "model.safetensors"
LOG_FILE = "log.jsonl"
CONFIG_FILE = "config.json"
# Entries of an identity that states of earlier versions do not have.
_NORMAL_CONTENT, _KNOWN_CONTENT = _LATER = ("content of the normal images", "content of the known anomalies")


@dataclass
class ProgressPoint:
    """The point that a run has reached: all batches before this one of this pass are done."""

    pass_index: int = 0
    batch_index: int = 0
    history: list[Record] = field(default_factory=list)
    """One record per finished pass."""


class RunFolder:
    """The files of one run.

    Args:
        path: of the folder, see `check_run_folder`.
        identity: see `run_identity`.
        writes: False in a process that leaves the writing to another one.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, writes: bool) -> None:
        self.path = path
        self.identity = identity
        self.writes = writes

    def open(self, levels: Sequence[LevelTrainer], *, resume: bool) -> ProgressPoint:
        """Start the run, or load its state into the trainers; return the point to train from.

        Raises:
            CheckpointError: the state is damaged or of another run.
        """
        point = ProgressPoint()
        if resume:
            point = load_training_state(self.path / STATE_FILE, levels, self.identity)
        elif self.writes:
            write_json(self.path / CONFIG_FILE, {name: self.identity[name] for name in ("architecture", "training")})
        self.write_log(point)  # drops lines of passes that the state does not know
        return point

    def save_state(self, levels: Sequence[LevelTrainer], point: ProgressPoint) -> None:
        """Write everything that the run needs to continue bit for bit."""
        if self.writes:
            save_training_state(self.path / STATE_FILE, levels, self.identity, point)

    def write_log(self, point: ProgressPoint) -> None:
        """Write one line per finished pass."""
        if self.writes:
            write_text(self.path / LOG_FILE, "".join(json.dumps(record) + "\n" for record in point.history))

    def save_model(self, model: BGAD, history: Mapping[str, Any]) -> None:
        """Write the trained model."""
        if self.writes:
            model.save(self.path / MODEL_FILE, history)


def check_run_folder(path: Path, *, resume: bool) -> None:
    """Create the folder, or raise an error if it cannot be used; called before any image is read.

    Raises:
        CheckpointError: there is nothing to resume.
        ConfigError: the folder holds a run that is not to be resumed.
    """
    make_folder(path)
    has_state = (path / STATE_FILE).is_file()
    if resume and not has_state:
        raise CheckpointError(f"nothing to resume in {path}: it has no {STATE_FILE}; train without resume")
    if not resume and (has_state or (path / MODEL_FILE).is_file()):
        raise ConfigError(f"{path} already holds a run; resume it, or choose another folder")


def run_identity(model: BGAD, split: Split, config: TrainConfig) -> dict[str, Any]:
    """Return what a state belongs to: it resumes only runs of the same model, configuration and images."""
    return {
        "architecture": model.architecture(),
        "backbone": model.backbone.fingerprint(),
        "training": config.as_dict(),
        "precision": resolve_matmul_precision(model.flow(0).matmul_precision),
        "normals": [sample.image.name for sample in split.normals],
        "known_anomalies": [sample.name for sample in split.known_anomalies],
        # Names recur in other lots of the same product, and a run on the images of two would be neither's.
        _NORMAL_CONTENT: content_digest(split.normals),
        _KNOWN_CONTENT: content_digest(split.known_anomalies),
    }


def save_training_state(
    path: Path, levels: Sequence[LevelTrainer], identity: Mapping[str, Any], point: ProgressPoint
) -> None:
    """Write weights, moments and sums of every level, and the progress point, atomically.

    Raises:
        OutputError: the file cannot be written; what was there before is kept.
    """
    tensors: dict[str, Tensor] = {}
    for level, trainer in enumerate(levels):
        tensors |= {f"flows.{level}.{name}": tensor for name, tensor in trainer.flow.state_dict().items()}
        for number, state in trainer.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{level}.{number}.{name}": value for name, value in state.items()}
    tensors["sums"] = torch.stack([trainer.sums for trainer in levels])
    place = {"pass": point.pass_index, "batch": point.batch_index, "history": point.history}
    save_checkpoint(path, "training", tensors, {"identity": identity, "place": place})


def load_training_state(path: Path, levels: Sequence[LevelTrainer], identity: Mapping[str, Any]) -> ProgressPoint:
    """Load weights, moments and sums into every level; return the progress point.

    Raises:
        CheckpointError: no such file, damaged, or of another run.
    """
    tensors, metadata = load_checkpoint(path, "training")
    ours = _without_number_asked_for(json.loads(json.dumps(identity)))
    theirs = _without_number_asked_for(metadata["identity"])
    compared = [name for name in {**ours, **theirs} if name in theirs or name not in _LATER]
    different = [name for name in compared if theirs.get(name) != ours.get(name)]
    if different:
        raise CheckpointError(
            f"{path} belongs to another run: it differs in {', '.join(different)}; resume with the configuration in "
            f"{path.parent / CONFIG_FILE} and the same images, or choose another folder"
        )
    for level, trainer in enumerate(levels):
        _load_level(trainer, level, tensors)
    place = metadata["place"]
    return ProgressPoint(place["pass"], place["batch"], place["history"])


def _without_number_asked_for(identity: dict[str, Any]) -> dict[str, Any]:
    """Leave out how many known anomalies were asked for: which ones were drawn is compared, and the default changed."""
    training = identity.get("training", {})
    anomalies = {name: value for name, value in training.get("anomalies", {}).items() if name != "num_anomalies"}
    return identity | {"training": training | {"anomalies": anomalies}}


def _load_level(trainer: LevelTrainer, level: int, tensors: Mapping[str, Tensor]) -> None:
    flow, state = f"flows.{level}.", dict[int, dict[str, Tensor]]()
    trainer.flow.load_state_dict({n.removeprefix(flow): t for n, t in tensors.items() if n.startswith(flow)})
    for name, tensor in tensors.items():
        if name.startswith(f"adam.{level}."):
            _, _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = tensor
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
    if isinstance(trainer.lr, Tensor):  # a captured step reads this very tensor
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.lr
    trainer.sums.copy_(tensors["sums"][level])
