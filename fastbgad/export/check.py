"""Whether an exported file computes what the model does: generated images, and the largest differences on them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import read_image, resize_image
from ..data.generated import write_noise_images
from ..errors import BackendError
from ..model.detector import BGAD, Prediction
from ..model.scoring import calibrate
from .formats import Run
from .graph import ANOMALY_MAP, DECISION, IMAGE_SCORE, IMAGE_SIDE, LOG_LIKELIHOOD, scoring_constants

# As a share of the highest possible score. Runtimes differ by 1e-6; a wrong border or a wrong constant by far more.
MAP_TOLERANCE = 1e-4
# Relative to 1 + |lp|: far from the normals, where likelihoods are 0 and the map tells nothing, lp still does.
LOG_LIKELIHOOD_TOLERANCE = 1e-3
# Weaker contrast comes closer to what a model of quiet surfaces knows.
_CONTRASTS = (1.0, 0.5, 0.25)
_GRAIN = 0.08


class Difference(NamedTuple):
    """The largest differences between two detectors on the same images."""

    anomaly_map: float  # as a share of the highest possible score
    image_score: float  # likewise
    log_likelihood: float  # relative to 1 + |lp|
    decisions: int  # pixels and images on another side, though not within MAP_TOLERANCE of a threshold

    @property
    def small(self) -> bool:
        """Whether all are within their tolerances."""
        # NaN fails every comparison.
        scores = self.anomaly_map <= MAP_TOLERANCE and self.image_score <= MAP_TOLERANCE
        return scores and self.log_likelihood <= LOG_LIKELIHOOD_TOLERANCE and self.decisions == 0

    def __str__(self) -> str:
        return (
            f"{self.anomaly_map:.1e} of the highest score in the anomaly map, {self.image_score:.1e} in the image "
            f"score, {self.log_likelihood:.1e} (relative) in log-likelihoods, {self.decisions} decisions"
        )


def check_images(size: tuple[int, int]) -> Tensor:
    """Three generated photographs [3, 3, H, W] float32 in [0, 1], contiguous, each of less contrast than the last.

    All are grainy. Where an image is smooth, the `gabor` backbone takes a variance as a difference of two nearly equal
    numbers, and any two runtimes, as well as the model and exact arithmetic, differ there by some 1e-4 of the highest
    score: that would say nothing about the graph.
    """
    with tempfile.TemporaryDirectory(prefix="fastbgad-export-") as folder:
        files = write_noise_images(folder, len(_CONTRASTS), max(size))
        pictures = np.stack([resize_image(read_image(file), size) for file in files])
    # An AOTInductor package reads memory as it was compiled for, whatever the strides of its input.
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32).contiguous() / 255
    grain = _GRAIN * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (0.5 + torch.tensor(_CONTRASTS).view(-1, 1, 1, 1) * (images - 0.5) + grain).clamp(0, 1)


def check_file(load: Callable[[Mapping[str, Tensor]], Run], model: BGAD) -> Difference:
    """The largest differences between a file and its model, on batches of 1 and 3 generated images.

    A trained model finds such images so unlikely that their map is flat, whatever becomes of it. So the file is run
    a second time with constants that suit these very images, and its map is held against its own log-likelihoods.

    Args:
        load: makes the file run, with these scoring constants in the place of its own.
        model: a calibrated model with `impl="torch"`; it stays as it is.

    Raises:
        BackendError: outputs of other names, shapes or types.
        FeatureError: the model gives log-likelihoods that are not finite.
    """
    images, run, differences = check_images(model.image_size), load({}), []
    own = scoring_constants(model.calibration(), model.normalizer)
    for batch in (1, len(images)):
        found = _on_cpu(run(images[:batch]))
        differences.append(compare(found, outputs_of(model.predict(images[:batch])), own))
    if all(difference.small for difference in differences):
        levels = [value.to(model.device) for name, value in found.items() if name.startswith(LOG_LIKELIHOOD)]
        fitting = calibrate(levels, model.image_size, beta=0.2, tau=0.1, normalizer=model.normalizer)
        constants = scoring_constants(fitting, model.normalizer)
        found = _on_cpu(load(constants)(images))
        levels = [value.to(model.device) for name, value in found.items() if name.startswith(LOG_LIKELIHOOD)]
        differences.append(compare(found, outputs_of(model.decide(levels, calibration=fitting)), constants))
    # Not max(): it loses NaN.
    anomaly_map, image_score, lp, decisions = torch.tensor(differences, dtype=torch.float64).amax(dim=0).tolist()
    return Difference(anomaly_map, image_score, lp, int(decisions))


def compare(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Difference:
    """The largest differences between two sets of outputs.

    Args:
        found, wanted: by name as `ExportedDetector.forward` returns them, on the CPU.
        constants: the `scoring_constants` that both were scored with.

    Raises:
        BackendError: outputs of other names, shapes or types.
    """
    if _described(found) != _described(wanted):
        raise BackendError(f"the outputs are {_described(found)} instead of {_described(wanted)}")
    highest = max(abs(float(constants["offset"])), 1e-6)
    edges = torch.cat([constants["normal_edge"], constants["anomalous_edge"]]).flatten().cpu()

    def apart(name: str) -> Tensor:
        return (found[name] - wanted[name]).abs()

    def elsewhere(sides: str, scores: str) -> int:
        undecided = ((wanted[scores][..., None] - edges).abs() <= MAP_TOLERANCE * highest).any(dim=-1)
        return int(((found[sides] != wanted[sides]) & ~undecided).sum())

    levels = [name for name in wanted if name.startswith(LOG_LIKELIHOOD)]
    return Difference(
        float(apart(ANOMALY_MAP).max()) / highest,
        float(apart(IMAGE_SCORE).max()) / highest,
        float(torch.stack([(apart(name) / (1 + wanted[name].abs())).max() for name in levels]).max()),
        elsewhere(DECISION, ANOMALY_MAP) + elsewhere(IMAGE_SIDE, IMAGE_SCORE),
    )


def outputs_of(prediction: Prediction) -> dict[str, Tensor]:
    """The outputs of `ExportedDetector` as the model itself gives them, on the CPU."""
    named = {name: getattr(prediction, name) for name in (ANOMALY_MAP, IMAGE_SCORE, IMAGE_SIDE, DECISION)}
    return _on_cpu(named | {f"{LOG_LIKELIHOOD}{level}": lp for level, lp in enumerate(prediction.log_likelihoods)})


def _on_cpu(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in outputs.items()}


def _described(outputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(outputs[name].shape)} {outputs[name].dtype}" for name in sorted(outputs))
