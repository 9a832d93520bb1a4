"""Conversion of checkpoints of the official BGAD, CFLOW-AD and anomalib's Cflow to models of fastbgad, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch

from ..config import LossConfig
from ..data import Sample
from ..errors import ConfigError, OutputError, check_choice
from ..model.calibration import calibrate_model
from ..model.detector import BGAD
from .checkpoint import KIND_NAMES, read_foreign, write_foreign
from .model import ReadOptions, from_model, how_to_load, joined, origin_of, to_model

Target = Literal["fastbgad", "bgad", "cflow-ad", "anomalib"]

_SUFFIX = ".safetensors"


class Conversion(NamedTuple):
    """Result of `convert`: the model, and facts and notes for its user."""

    model: BGAD
    facts: dict[str, str]  # about source, target and model, by name
    notes: tuple[str, ...]  # on the use of the file, in whole sentences


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
    """Read a model of any kind and write it as one of any kind.

    Args:
        source: a model of fastbgad, or a checkpoint of the official BGAD, CFLOW-AD or anomalib's Cflow.
        target: the file to write; models of fastbgad have the suffix .safetensors, the others do not.
        to: kind of the target. By default other code's checkpoints become models of fastbgad. A model of fastbgad stays
            one if `target` has its suffix, becomes anomalib's for .ckpt, else the kind that it was converted from, or
            the official BGAD's.
        options: settings that the source lacks; None for a model of fastbgad.
        normals: normal images to calibrate a model of fastbgad on; without any, a converted one has no calibration.
        beta: see `calibrate_model`.
        tau: see `calibrate_model`.
        force: overwrite `target`.
        device: of the calibration.
        workers: threads that decode images.
        on_images: called with the number of images of every finished batch of the calibration.

    Raises:
        CheckpointError: a source that cannot be read, or that the target's code cannot express.
        ConfigError: arguments that do not fit together.
        OutputError: `target` exists or cannot be written.
        BackboneError, DataError, FeatureError: see `create_backbone` and `calibrate_model`.
    """
    source, target, options = Path(source), Path(target), options or ReadOptions()
    own_model = None
    if _is_own_format(source):
        _refuse_options(source, options)
        own_model = BGAD.load(source)
    to = to or _default_target(own_model, target)
    _check_target(source, target, to, own_model is not None, bool(normals), force)
    model, kind, notes = _from_foreign(source, options) if own_model is None else (own_model, "model of fastbgad", ())
    if normals:
        calibrate_model(model.to(device), normals, beta=beta, tau=tau, workers=workers, on_images=on_images)
        if (depth := normals[0].decoding.bit_depth) is not None:
            model.history["bit_depth"] = depth
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


def _from_foreign(source: Path, options: ReadOptions) -> tuple[BGAD, str, tuple[str, ...]]:
    """Return the model in a checkpoint of other code, the kind of checkpoint in words, and notes."""
    foreign = read_foreign(source)
    return to_model(foreign, options), f"checkpoint of {KIND_NAMES[foreign.kind]}", foreign.notes


def _is_own_format(path: Path) -> bool:
    """Return True for a file in the format of fastbgad's models; a safetensors file has JSON after an 8-byte length."""
    try:
        with path.open("rb") as file:
            return path.suffix == _SUFFIX or file.read(9)[8:] == b"{"
    except OSError:
        return path.suffix == _SUFFIX


def _refuse_options(source: Path, options: ReadOptions) -> None:
    given = [field.name for field in fields(options) if getattr(options, field.name) not in (None, ())]
    if given:
        raise ConfigError(
            f"{source} is a model of fastbgad and holds its {' and '.join(given)}; such options are for checkpoints of "
            "other code: leave them out"
        )


def _default_target(model: BGAD | None, target: Path) -> Target:
    if model is None or target.suffix == _SUFFIX:
        return "fastbgad"
    if target.suffix == ".ckpt":
        return "anomalib"
    origin = origin_of(model).get("from")
    return cast(Target, origin) if origin in KIND_NAMES else "bgad"


def _check_target(source: Path, target: Path, to: Target, own_format: bool, calibrates: bool, force: bool) -> None:
    """Raise an error unless the target suits the source and the calibration, and may be written.

    Args:
        source: the file to read.
        target: the file to write.
        to: its kind.
        own_format: True if the source is a model of fastbgad.
        calibrates: True if there are images to calibrate on.
        force: True if the target may be overwritten.
    """
    check_choice("to", to, Target)
    if (target.suffix == _SUFFIX) != (to == "fastbgad"):
        kind = "a model of fastbgad" if to == "fastbgad" else f"a checkpoint of {KIND_NAMES[to]}"
        raise ConfigError(
            f"{target} would be {kind}; only models of fastbgad have the suffix {_SUFFIX}: rename the file, or choose "
            "its kind with --to"
        )
    if to == "fastbgad" and own_format and not calibrates:
        raise ConfigError(f"{source} is a model of fastbgad already; give --data to calibrate it, or another --to")
    if to != "fastbgad" and calibrates:
        raise ConfigError(f"a checkpoint of {KIND_NAMES[to]} holds no calibration; leave --data out")
    if target.exists() and not force:
        raise OutputError(f"{target} exists already; choose another file, or --force to overwrite it")


def _facts(model: BGAD, normals: int) -> dict[str, str]:
    """Return facts about a model, by name.

    Args:
        model: the model.
        normals: number of images that it was calibrated on just now.
    """
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
