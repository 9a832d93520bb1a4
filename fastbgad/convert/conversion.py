"""Converts checkpoints of the official BGAD, CFLOW-AD and anomalib's Cflow to models of fastbgad, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import torch

from ..config import LossConfig
from ..data import Sample
from ..errors import ConfigError, OutputError
from ..model.calibration import calibrate_model
from ..model.detector import BGAD
from .checkpoint import KIND_NAMES, read_foreign, write_foreign
from .model import ReadOptions, from_model, how_to_load, joined, origin_of, to_model

Target = Literal["fastbgad", "bgad", "cflow-ad", "anomalib"]

_SUFFIX = ".safetensors"


class Conversion(NamedTuple):
    """What `convert` found and wrote."""

    model: BGAD
    facts: dict[str, str]  # what there is to know about it, by name
    notes: tuple[str, ...]  # what to mind when the file is used, in whole sentences


def convert(
    source: str | Path,
    target: str | Path,
    to: Target | None = None,
    options: ReadOptions | None = None,
    *,
    normals: Sequence[Sample] = (),
    beta: float = LossConfig.beta,
    tau: float = LossConfig.tau,
    force: bool = False,
    device: str | torch.device = "cpu",
    workers: int = 2,
    on_images: Callable[[int], None] | None = None,
) -> Conversion:
    """Reads a model of any kind and writes it as one of any kind.

    Args:
        source: a model of fastbgad, or a checkpoint of the official BGAD, CFLOW-AD or anomalib's Cflow.
        target: the file to write; models of fastbgad have the suffix .safetensors, the others do not.
        to: what to write. By default other code's checkpoints become models of fastbgad; a model of fastbgad stays one
            if `target` ends so, becomes anomalib's for .ckpt, else what it was converted from or the official BGAD's.
        options: what the source does not say about itself; None for a model of fastbgad.
        normals: normal images to calibrate a model of fastbgad on; without any, a converted one has no calibration.
        beta: see `calibrate_model`.
        tau: see `calibrate_model`.
        force: overwrite `target`.
        device: where the calibration runs.
        workers: threads that decode images.
        on_images: called with the number of images of every finished batch of the calibration.

    Raises:
        CheckpointError: a source that cannot be read, or that the target's code cannot express.
        ConfigError: arguments that do not fit together. OutputError: `target` exists or cannot be written.
        BackboneError, DataError, FeatureError: see `create_backbone` and `calibrate_model`.
    """
    source, target, options = Path(source), Path(target), options or ReadOptions()
    ours = _is_ours(source)
    model = None
    if ours:
        _refuse_options(source, options)
        model = BGAD.load(source)
    to = to or _default_target(model, target)
    _check_target(source, target, to, ours, bool(normals), force)
    notes: tuple[str, ...] = ()
    if model is None:
        foreign = read_foreign(source)
        model, notes = to_model(foreign, options), foreign.notes
        kind = f"checkpoint of {KIND_NAMES[foreign.kind]}"
    else:
        kind = "model of fastbgad"
    if normals:
        calibrate_model(model.to(device), normals, beta=beta, tau=tau, workers=workers, on_images=on_images)
        model.cpu()
    facts = {"read": f"{source}, {kind}", **_facts(model, len(normals))}
    if to == "fastbgad":
        model.save(target, allow_uncalibrated=True)
        facts["wrote"] = f"{target}, model of fastbgad"
    else:
        write_foreign(target, from_model(model, to, source))
        facts["wrote"] = f"{target}, checkpoint of {KIND_NAMES[to]}"
        notes += how_to_load(model, to)
    return Conversion(model, facts, notes)


def _is_ours(path: Path) -> bool:
    """Whether a file is in the format of our models: a safetensors file has JSON after an 8-byte length."""
    try:
        with path.open("rb") as file:
            return path.suffix == _SUFFIX or file.read(9)[8:] == b"{"
    except OSError:
        return path.suffix == _SUFFIX


def _refuse_options(source: Path, options: ReadOptions) -> None:
    given = [field.name for field in fields(options) if getattr(options, field.name) not in (None, ())]
    if given:
        raise ConfigError(
            f"{source} is a model of fastbgad and knows its {' and '.join(given)}; such options are for checkpoints of "
            "other code: leave them out"
        )


def _default_target(model: BGAD | None, target: Path) -> Target:
    if model is None or target.suffix == _SUFFIX:
        return "fastbgad"
    if target.suffix == ".ckpt":
        return "anomalib"
    known = origin_of(model).get("from")
    return cast(Target, known) if known in KIND_NAMES else "bgad"


def _check_target(source: Path, target: Path, to: Target, ours: bool, calibrates: bool, force: bool) -> None:
    if to not in get_args(Target):
        raise ConfigError(f"to is {to!r}; choose one of {', '.join(get_args(Target))}")
    if (target.suffix == _SUFFIX) != (to == "fastbgad"):
        what = "a model of fastbgad" if to == "fastbgad" else f"a checkpoint of {KIND_NAMES[to]}"
        raise ConfigError(
            f"{target} would be {what}; only models of fastbgad have the suffix {_SUFFIX}: name the file so, or say "
            "with --to what it should be"
        )
    if to == "fastbgad" and ours and not calibrates:
        raise ConfigError(f"{source} is a model of fastbgad already; give --data to calibrate it, or another --to")
    if to != "fastbgad" and calibrates:
        raise ConfigError(f"a checkpoint of {KIND_NAMES[to]} holds no calibration; leave --data out")
    if target.exists() and not force:
        raise OutputError(f"{target} exists already; choose another file, or --force to overwrite it")


def _facts(model: BGAD, normals: int) -> dict[str, str]:
    """What there is to know about a model, by name."""
    backbone, config, origin = model.backbone.config(), model.flow_config, origin_of(model)
    padding = f", {backbone['padding_mode']} padding" if "padding_mode" in backbone else ""
    tensors = f" ({origin['encoder']})" if "encoder" in origin else ""
    if normals:
        calibration = f"on {normals} normal images"
    elif model.calibrated:
        calibration = "the model's own"
    else:
        calibration = "none: predict needs it (--data DIR), evaluate --calibration official does without"
    permutation = origin.get("permutation", "matrix" if config.hard_permutation else "rotation")
    height, width = model.image_size
    return {
        "backbone": f"{backbone['name']}, levels {joined(backbone['levels'])}{padding}{tensors}",
        "channels": joined(model.backbone.channels),
        "position": f"{config.condition_channels} channels" if config.condition_channels else "not used",
        "coupling layers": str(config.coupling_layers),
        "permutation": {"index": "hard, as indices", "matrix": "hard, as matrices"}.get(permutation, "soft"),
        "clamp": f"{config.clamp:g}" + (f" ({origin['clamp']})" if "clamp" in origin else ""),
        "clamp form": config.clamp_form + (f" ({origin['clamp_form']})" if "clamp_form" in origin else ""),
        "image size": f"{height} x {width}",
        "calibration": calibration,
    }
