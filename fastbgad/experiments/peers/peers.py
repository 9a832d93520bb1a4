"""Methods of other authors, run by anomalib on the split that fastbgad's own methods are measured on.

    scores = run_peer(cell, category, split, setup, device)
    evaluate(scores.maps, masks, scores.image_scores, labels)

A peer learns from the split's normal images alone, SuperSimpleNet also from the known anomalies with their masks. All
get the test images without labels and masks. Maps are the raw ones of the model: no normalization, no threshold, no
validation. Of the other methods in the paper's tables
(MSFD, FCDD, DevNet, DRA, AE-MSE, AE-SSIM, VT-ADL, FLOS, SAOE, MLEP) anomalib 2.7 has none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...data import Category, Split
from ...errors import BackendError, ConfigError, DataError, FastBGADError, FeatureError
from ...wording import first_line
from ..plan import PEERS, Cell, Setup
from .recipes import Recipe, recipe_of


class PeerScores(NamedTuple):
    """Scores of n test images by a peer, on the CPU, in the order of `split.test`."""

    maps: Tensor  # [n, H, W] float32 at the setup's image size; higher is more anomalous
    image_scores: Tensor  # [n] float32, as the model gives them
    facts: dict[str, Any]  # plain values: recipe, weights, versions


def run_peer(
    cell: Cell,
    category: Category,
    split: Split,
    setup: Setup,
    device: torch.device,
    *,
    workers: int = 2,
    anomaly_source: Path | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> PeerScores:
    """Train a method of another author on the split and score its test images.

    Networks start with anomalib's default weights from the hub, since those of `setup` (a file or a package) belong to
    another network; with `setup.weights` "random" they are untrained. `cell.seed` seeds all draws, and the caller's
    random state is unchanged. On a GPU the same seed may give slightly different scores. CFLOW-AD's scores are relative
    to the test images given, as in its authors' code.

    Args:
        cell: method, seed and, as overrides, what differs from the method's recipe.
        category: for messages.
        split: what to train and test on; of the peers only SuperSimpleNet uses its known anomalies.
        setup: image size, and whether the weights are random. The rest concerns fastbgad's own methods.
        device: where to run.
        workers: threads that decode images.
        anomaly_source: a folder of textures that DRAEM pastes as anomalies, such as the Describable Textures Dataset
            of its authors; None: it pastes noise. Other methods ignore it.
        state: weights of the backbone in place of those of `setup.weights`, under the names of timm's whole model. CFA
            then takes any timm backbone. Images are normalized with that backbone's own mean and deviation.

    Raises:
        MissingDependencyError: anomalib is not installed.
        ConfigError: see `recipe_of`; an image size that the method cannot take.
        BackboneError: the pretrained weights cannot be had.
        CheckpointError: `state` does not fit the backbone.
        DataError: an image that cannot be read, no image to train or test on, or no texture in `anomaly_source`.
        BackendError: too little memory, or anomalib failed in another way.
        FeatureError: scores that are not finite.
    """
    recipe = recipe_of(cell)
    label, size = PEERS[cell.method], setup.image_size
    _check_size(label, recipe, size)
    _check_images(cell, category, split)
    device = _indexed(device)
    with _seeded(cell.seed, device):  # the import draws random numbers; it takes seconds, and needs an extra
        from .engine import PeerTraining, train_and_score

    pretrained = state is None and setup.weights != "random"
    training = PeerTraining(cell.method, recipe, pretrained, size, device, workers, anomaly_source, state)
    with _seeded(cell.seed, device), _clear_errors(f"{label} on {category.name}", recipe, size):
        maps, image_scores, facts = train_and_score(training, split)
    if maps.shape[-2:] != size:
        maps = interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    if not (maps.isfinite().all() and image_scores.isfinite().all()):
        raise FeatureError(
            f"{label} gave scores that are NaN or Inf on {category.name} with {len(split.normals)} training images; "
            "give it more images, pretrained weights or fewer epochs"
        )
    facts["weights"] = _weights_text(recipe, pretrained, state is not None)
    return PeerScores(maps, image_scores, facts)


def _weights_text(recipe: Recipe, pretrained: bool, given: bool) -> str:
    if recipe.backbone is None:
        return "none"
    return "pretrained" if pretrained else "given" if given else "random"


def _check_images(cell: Cell, category: Category, split: Split) -> None:
    label = PEERS[cell.method]
    for part, samples in (("train", split.normals), ("test", split.test)):
        if not samples:
            raise DataError(f"{category.root} has no image to {part} {label} on")
    if cell.learns_from_anomalies and not split.known_anomalies:
        raise DataError(f"{label} learns from anomalies, but none of {category.root} is known: raise num_anomalies")


def _check_size(label: str, recipe: Recipe, size: tuple[int, int]) -> None:
    height, width = size
    if recipe.square and height != width:
        raise ConfigError(f"the image size is {height} x {width}, but {label} takes square images only")
    if min(size) < recipe.smallest:
        raise ConfigError(
            f"the image size is {height} x {width}, but {label} needs at least {recipe.smallest} pixels a side"
        )
    if height % recipe.multiple or width % recipe.multiple:
        raise ConfigError(
            f"the image size is {height} x {width}, but {label} needs multiples of {recipe.multiple} pixels"
        )


def _indexed(device: torch.device) -> torch.device:
    """Return the device with its number: "cuda" alone means the current one, which Lightning does not know."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every generator that anomalib draws from, and restore its state afterwards.

    Lightning's `seed_everything` is not used, because it sets environment variables and reseeds every GPU.
    """
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 (scikit-learn draws from it)
    cuda = device.type == "cuda"
    with ExitStack() as stack:
        if cuda:
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.random.fork_rng(devices=[device] if cuda else []))
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _clear_errors(what: str, recipe: Recipe, size: tuple[int, int]) -> Iterator[None]:
    """Turn anomalib's errors into one message, with the original error as the cause."""
    try:
        yield
    except FastBGADError:
        raise
    except Exception as error:
        reason = first_line(error)
        # PyTorch has no class of its own for a CPU that runs out of memory.
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if memory:
            raise BackendError(
                f"{what} needs more memory than there is, at {size[0]} x {size[1]} pixels and {recipe.batch_size} "
                f"images at a time ({reason}); lower the image size or peer.batch_size, use a machine with more "
                "memory, or leave the method out"
            ) from error
        raise BackendError(
            f"anomalib could not run {what} ({type(error).__name__}: {reason}); leave the method out, or look at the "
            "cause of this error"
        ) from error
