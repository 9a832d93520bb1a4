"""The state of a training run in a file: everything it needs to go on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..system.checkpoint import load_checkpoint, save_checkpoint
from .level import LevelTrainer


def save_training_state(
    path: Path, levels: Sequence[LevelTrainer], identity: Mapping[str, Any], place: Mapping[str, Any]
) -> None:
    """Writes weights, moments and sums of every level, atomically.

    Args:
        path: of the file.
        levels: the run's trainers.
        identity: what the state belongs to.
        place: where the run stands.

    Raises:
        OutputError: the file cannot be written; what was there before is kept.
    """
    tensors: dict[str, Tensor] = {}
    for level, trainer in enumerate(levels):
        tensors |= {f"flows.{level}.{name}": tensor for name, tensor in trainer.flow.state_dict().items()}
        for number, state in trainer.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{level}.{number}.{name}": value for name, value in state.items()}
    tensors["sums"] = torch.stack([trainer.sums for trainer in levels])
    save_checkpoint(path, "training", tensors, {"identity": identity, "place": place})


def load_training_state(path: Path, levels: Sequence[LevelTrainer], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Takes up the weights, moments and sums of every level; returns the place where the run stands.

    Raises:
        CheckpointError: no such file, damaged, or of another run.
    """
    tensors, metadata = load_checkpoint(path, "training")
    ours = json.loads(json.dumps(identity))
    theirs = metadata["identity"]
    different = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    if different:
        raise CheckpointError(
            f"{path} belongs to another run: it differs in {', '.join(different)}; resume with the configuration in "
            f"{path.parent / 'config.json'} and the same images, or choose another folder"
        )
    for level, trainer in enumerate(levels):
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
    place: dict[str, Any] = metadata["place"]
    return place
