"""Check that an exported file computes the same as its model: the largest differences on generated images."""

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
# Relative to 1 + |lp|. Far from the normals likelihoods are 0 and the map is flat, but lp is not.
LOG_LIKELIHOOD_TOLERANCE = 1e-3
# Weaker contrast comes closer to the training images of models of plain surfaces.
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
        """True if all are within their tolerances."""
        # NaN fails every comparison.
        scores = self.anomaly_map <= MAP_TOLERANCE and self.image_score <= MAP_TOLERANCE
        return scores and self.log_likelihood <= LOG_LIKELIHOOD_TOLERANCE and self.decisions == 0

    def __str__(self) -> str:
        return (
            f"{self.anomaly_map:.1e} of the highest score in the anomaly map, {self.image_score:.1e} in the image "
            f"score, {self.log_likelihood:.1e} (relative) in log-likelihoods, {self.decisions} decisions"
        )


def check_images(size: tuple[int, int]) -> Tensor:
    """Generate three photographs [3, 3, H, W] float32 in [0, 1], contiguous, each of less contrast than the last.

    All are grainy. Where an image is smooth, the `gabor` backbone computes a variance as a difference of two nearly
    equal numbers, and there any two runtimes, or the model and exact arithmetic, differ by some 1e-4 of the highest
    score, even with a correct graph.
    """
    with tempfile.TemporaryDirectory(prefix="fastbgad-export-") as folder:
        files = write_noise_images(folder, len(_CONTRASTS), max(size))
        pictures = np.stack([resize_image(read_image(file), size) for file in files])
    # An AOTInductor package reads memory as it was compiled for, whatever the strides of its input.
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32).contiguous() / 255
    grain = _GRAIN * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (0.5 + torch.tensor(_CONTRASTS).view(-1, 1, 1, 1) * (images - 0.5) + grain).clamp(0, 1)


def check_file(load: Callable[[Mapping[str, Tensor]], Run], model: BGAD) -> Difference:
    """Return the largest differences between a file and its model, on batches of 1 and 3 generated images.

    To a trained model such images are so unlikely that their map is flat, and a wrong map would not differ. So the file
    is run a second time with scoring constants calibrated on these images, and its map is compared with the one that
    the model computes from the file's log-likelihoods.

    Args:
        load: loads the file and replaces its scoring constants by these.
        model: a calibrated model with `impl="torch"`; it is not changed.

    Raises:
        BackendError: outputs of other names, shapes or types.
        FeatureError: the model gives log-likelihoods that are not finite.
    """
    images, run, differences = check_images(model.image_size), load({}), []
    own_constants = scoring_constants(model.calibration(), model.normalizer)
    for batch in (1, len(images)):
        outputs = _on_cpu(run(images[:batch]))
        differences.append(compare(outputs, outputs_of(model.predict(images[:batch])), own_constants))
    if all(difference.small for difference in differences):
        levels = _log_likelihoods(outputs, model.device)
        calibration = calibrate(levels, model.image_size, beta=0.2, tau=0.1, normalizer=model.normalizer)
        constants = scoring_constants(calibration, model.normalizer)
        outputs = _on_cpu(load(constants)(images))
        expected = model.decide(_log_likelihoods(outputs, model.device), calibration=calibration)
        differences.append(compare(outputs, outputs_of(expected), constants))
    # Not max(): it loses NaN.
    anomaly_map, image_score, lp, decisions = torch.tensor(differences, dtype=torch.float64).amax(dim=0).tolist()
    return Difference(anomaly_map, image_score, lp, int(decisions))


def compare(
    outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> Difference:
    """Return the largest differences between two sets of outputs.

    Args:
        outputs: by name as `ExportedDetector.forward` returns them, on the CPU.
        expected: likewise; relative differences refer to these.
        constants: the `scoring_constants` that both were scored with.

    Raises:
        BackendError: outputs of other names, shapes or types.
    """
    if _described(outputs) != _described(expected):
        raise BackendError(f"the outputs are {_described(outputs)} instead of {_described(expected)}")
    highest = max(abs(float(constants["offset"])), 1e-6)
    edges = torch.cat([constants["normal_edge"], constants["anomalous_edge"]]).flatten().cpu()

    def distance(name: str) -> Tensor:
        return (outputs[name] - expected[name]).abs()

    def changed_sides(sides: str, scores: str) -> int:
        undecided = ((expected[scores][..., None] - edges).abs() <= MAP_TOLERANCE * highest).any(dim=-1)
        return int(((outputs[sides] != expected[sides]) & ~undecided).sum())

    levels = [name for name in expected if name.startswith(LOG_LIKELIHOOD)]
    return Difference(
        float(distance(ANOMALY_MAP).max()) / highest,
        float(distance(IMAGE_SCORE).max()) / highest,
        float(torch.stack([(distance(name) / (1 + expected[name].abs())).max() for name in levels]).max()),
        changed_sides(DECISION, ANOMALY_MAP) + changed_sides(IMAGE_SIDE, IMAGE_SCORE),
    )


def outputs_of(prediction: Prediction) -> dict[str, Tensor]:
    """Return a prediction of the model as `ExportedDetector` names its outputs, on the CPU."""
    named = {name: getattr(prediction, name) for name in (ANOMALY_MAP, IMAGE_SCORE, IMAGE_SIDE, DECISION)}
    return _on_cpu(named | {f"{LOG_LIKELIHOOD}{level}": lp for level, lp in enumerate(prediction.log_likelihoods)})


def _log_likelihoods(outputs: Mapping[str, Tensor], device: torch.device) -> list[Tensor]:
    return [value.to(device) for name, value in outputs.items() if name.startswith(LOG_LIKELIHOOD)]


def _on_cpu(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in outputs.items()}


def _described(outputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(outputs[name].shape)} {outputs[name].dtype}" for name in sorted(outputs))
