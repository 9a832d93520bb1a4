"""anomalib's models and its Engine, without their files, bars, messages and signal handling."""

from __future__ import annotations

import logging
import signal
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from ...backbones.timm_features import blank_extractor
from ...backbones.weights import hub_overlay, load_weights
from ...data import Split
from ...errors import BackboneError, DataError, MissingDependencyError
from ...wording import first_line
from ..plan import PEERS
from . import cflow_ad
from .data import IMAGENET, SplitData, Statistics
from .recipes import Recipe

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that anomalib imports
        import anomalib.models.components.sampling.k_center_greedy as coreset_module
        import anomalib.models.image.cfa.torch_model as cfa_module
        import anomalib.models.image.padim.torch_model as padim_module
        import anomalib.models.image.supersimplenet.torch_model as supersimplenet_module
        from anomalib.engine import Engine
        from anomalib.models import Cfa, Cflow, Draem, Padim, Patchcore, Supersimplenet
        from anomalib.models.components import TimmFeatureExtractor
        from lightning.pytorch import Callback
        from lightning.pytorch.plugins.environments import LightningEnvironment
        from lightning.pytorch.strategies import SingleDeviceStrategy
except ModuleNotFoundError as error:
    package: str = (error.name or "anomalib").partition(".")[0]
    raise MissingDependencyError(package, "peers", "a method of another author") from error

# Features that PaDiM keeps of a network that its authors do not use: as of ResNet-18, the smallest that they do.
_PADIM_FEATURES = 100
_HUB_TIMEOUT = 10.0  # seconds until the hub counts as unreachable
# Lightning exists under several names, and its messages may come from any of them.
_LOGGERS = ("anomalib", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
# No pre-processing (images come ready), no normalized maps, no thresholds, no metrics, no pictures.
_BARE: dict[str, Any] = {"pre_processor": False, "post_processor": False, "evaluator": False, "visualizer": False}


class PeerTraining(NamedTuple):
    """A method of another author to train, with its recipe and its device."""

    method: str
    recipe: Recipe
    pretrained: bool
    size: tuple[int, int]
    device: torch.device
    workers: int
    anomaly_source: Path | None
    state: Mapping[str, Tensor] | None = None


def train_and_score(training: PeerTraining, split: Split) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return maps [n, H, W] and image scores [n] of the test images, float32 on the CPU, and facts of the run.

    For errors see `run_peer`.
    """
    recipe = training.recipe
    batch_size = min(recipe.batch_size, len(split.normals))
    data: Any = SplitData(  # not a datamodule of anomalib, which would sort the images and split them again
        split,
        training.size,
        batch_size,
        statistics=_statistics(training),
        supervised=training.method == "supersimplenet",
        whole_batches=training.method == "cflow_ad",
        workers=training.workers,
    )
    with _quiet(), tempfile.TemporaryDirectory(prefix="fastbgad-peer-") as folder:
        model = _build(training, Path(folder))
        recorder = cflow_ad.prepare(model, training.size, batch_size) if training.method == "cflow_ad" else None
        collector = _Collector()
        engine = Engine(
            callbacks=[collector],
            default_root_dir=folder,
            max_epochs=recipe.epochs,
            accelerator="gpu" if training.device.type == "cuda" else training.device.type,
            devices=1,
            # The device itself, since some models require `devices=1`, which alone would mean the first GPU.
            strategy=SingleDeviceStrategy(training.device),
            # One process, also where torchrun or SLURM started several: each runs cells of its own.
            plugins=[LightningEnvironment()],
            barebones=True,  # no checkpoints, loggers, bars or summaries
        )
        start = time.perf_counter()
        with _interrupts(engine):
            engine.fit(model, datamodule=data)
        trained = time.perf_counter()
        with _interrupts(engine):
            engine.predict(model, datamodule=data, return_predictions=False)
        maps, image_scores = collector.result()
    if recorder is not None:
        maps = recorder.maps(training.size)
        image_scores = maps.amax(dim=(1, 2))
    facts = _facts(training, split, batch_size)
    facts["training_seconds"] = round(trained - start, 3)
    facts["scoring_seconds"] = round(time.perf_counter() - trained, 3)
    return maps, image_scores, facts


def _facts(training: PeerTraining, split: Split, batch_size: int) -> dict[str, Any]:
    recipe = training.recipe
    facts: dict[str, Any] = {
        "backbone": recipe.backbone or "none",
        "epochs": recipe.epochs,
        "anomalib": metadata.version("anomalib"),
        "training_images": len(split.normals),
        "batch_size": batch_size,
    }
    if recipe.levels:
        facts["levels"] = list(recipe.levels)
    if training.method == "supersimplenet":
        facts["known_anomalies"] = len(split.known_anomalies)
    if training.method == "draem":
        facts["anomaly_source"] = "noise" if training.anomaly_source is None else training.anomaly_source.name
    return facts


class _Collector(Callback):
    """Callback that stores the scores of every predicted batch, and none of its images."""

    def __init__(self) -> None:
        self._maps: list[Tensor] = []
        self._scores: list[Tensor] = []

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        maps = outputs.anomaly_map
        self._maps.append(maps.detach().reshape(-1, *maps.shape[-2:]).float().cpu())
        self._scores.append(outputs.pred_score.detach().reshape(-1).float().cpu())

    def result(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self._maps), torch.cat(self._scores)


def _build(training: PeerTraining, folder: Path) -> Any:
    """Return the untrained model; raise `BackboneError` if its backbone or its weights are not available."""
    if training.method == "draem":
        return _draem(training.anomaly_source, folder)
    backbone = training.recipe.backbone
    assert backbone is not None
    if training.method == "cfa":
        return (
            _cfa(backbone, training.pretrained)
            if training.state is None
            else _cfa_on_timm(training, backbone, training.state)
        )
    label = PEERS[training.method]
    if training.pretrained:
        try:
            hub_overlay(backbone)  # asks the hub once, where timm would try for minutes
        except BackboneError as error:
            raise _no_weights(label, backbone, error) from error
    try:
        model = _on_timm(training, backbone)
    except (BackboneError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise _no_backbone(label, backbone, error) from error
    if training.state is not None:
        extractor = next(module for module in model.modules() if isinstance(module, TimmFeatureExtractor))
        load_weights(extractor.feature_extractor, training.state, f"what was given as weights of {label}", backbone)
    return model


def _on_timm(training: PeerTraining, backbone: str) -> Any:
    """Build a method that takes its features from timm; its weights are random unless the hub's are asked for."""
    options: dict[str, Any] = {"backbone": backbone, **_BARE}
    if training.method == "cflow_ad":
        return Cflow(pre_trained=training.pretrained, **options)
    # By number: a layer's name differs between families of networks.
    options["layers"] = list(training.recipe.levels)
    if training.method == "supersimplenet":
        # It has no such option of its own.
        extractor = partial(TimmFeatureExtractor, pre_trained=training.pretrained)
        with _replaced(supersimplenet_module, "TimmFeatureExtractor", extractor):
            return Supersimplenet(supervised=True, **options)
    if training.method == "patchcore":
        return Patchcore(pre_trained=training.pretrained, **options)
    known = padim_module._N_FEATURES_DEFAULTS.get(backbone)
    features = known or min(_PADIM_FEATURES, sum(_channels(backbone, training.recipe.levels)))
    return Padim(pre_trained=training.pretrained, n_features=features, **options)


def _channels(backbone: str, levels: Sequence[int]) -> list[int]:
    return [int(channels) for channels in blank_extractor(backbone).feature_info.channels(list(levels))]


def _statistics(training: PeerTraining) -> Statistics | None:
    """Return mean and deviation that images are normalized with; None for a method without a backbone."""
    if training.recipe.backbone is None:
        return None
    torchvisions = training.method == "cfa" and training.state is None
    source = None if torchvisions else timm.get_pretrained_cfg(training.recipe.backbone, allow_unregistered=True)
    if source is None:
        return IMAGENET
    return tuple(map(float, source.mean)), tuple(map(float, source.std))


def _draem(source: Path | None, folder: Path) -> Any:
    if source is None:
        # Given a folder without images, anomalib pastes noise; given none, it downloads textures.
        source = folder / "textures"
        source.mkdir()
        return Draem(dtd_dir=source, **_BARE)
    if not source.is_dir():
        raise DataError(f"the folder {source} of textures for DRAEM does not exist; check the path, or leave it out")
    model = Draem(dtd_dir=source, **_BARE)
    if not model.augmenter.anomaly_source_paths:
        raise DataError(f"{source} holds no textures (jpg, png, ...) for DRAEM; check the path, or leave it out")
    return model


def _cfa(backbone: str, pretrained: bool) -> Any:
    """Build anomalib's CFA, whose extractor is replaced for random weights, because it only has pretrained ones."""
    try:
        if not pretrained:
            with _replaced(cfa_module, "get_feature_extractor", _untrained_extractor):
                return Cfa(backbone, **_BARE)
        if backbone in cfa_module.SUPPORTED_BACKBONES:
            _ask_torchvision(torchvision.models.get_model_weights(backbone).DEFAULT.url)
        return Cfa(backbone, **_BARE)
    except OSError as error:  # of urllib
        raise _no_weights("CFA", backbone, error) from error
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        raise _no_backbone("CFA", backbone, error) from error


class _NamedLevels(nn.Module):
    """A timm extractor whose levels have the names that CFA expects, those of a residual network."""

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the levels, finest first."""
        return {f"layer{number}": level for number, level in enumerate(self.extractor(images), start=1)}


def _cfa_on_timm(training: PeerTraining, backbone: str, state: Mapping[str, Tensor]) -> Any:
    """Build CFA on a network of timm, which anomalib does not offer.

    It is built as for ResNet-18; then its extractor is the given one and its descriptor has that one's channels.
    """
    try:
        extractor: Any = timm.create_model(
            backbone, pretrained=False, features_only=True, out_indices=training.recipe.levels
        )
        channels = sum(extractor.feature_info.channels())
        named = _NamedLevels(extractor).eval()
        with _replaced(cfa_module, "get_feature_extractor", lambda *_: named):
            model = Cfa("resnet18", **_BARE)
    except (RuntimeError, ValueError, KeyError) as error:
        raise _no_backbone("CFA", backbone, error) from error
    load_weights(extractor, state, "what was given as weights of CFA", backbone)
    descriptor = model.model.descriptor
    descriptor.layer = cfa_module.CoordConv2d(channels, channels // model.model.gamma_d, kernel_size=1)
    return model


def _untrained_extractor(backbone: str, return_nodes: list[str]) -> Any:
    network = torchvision.models.get_model(backbone, weights=None)
    return create_feature_extractor(network, return_nodes=return_nodes).eval()


def _ask_torchvision(url: str) -> None:
    """Raise OSError if weights are neither cached nor reachable: PyTorch's own download waits without limit."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]).is_file():
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_TIMEOUT).close()


def _no_weights(label: str, backbone: str, error: Exception) -> BackboneError:
    reason = str(error).partition(";")[0] or type(error).__name__
    return BackboneError(
        f"{label} starts from pretrained weights of {backbone}, and they cannot be had ({reason}); run it once on a "
        'machine that reaches the hub and copy its cache, use --weights random (in Python weights="random") for an '
        f"untrained network, or leave {label} out"
    )


def _no_backbone(label: str, backbone: str, error: Exception) -> BackboneError:
    reason = first_line(error)
    return BackboneError(f"anomalib cannot build {label} on {backbone} ({reason}); choose another peer.backbone")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages below errors, warnings and bars of anomalib and Lightning, and replace `update_distances`."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for module in (cfa_module, coreset_module):
            stack.enter_context(_replaced(module, "tqdm", _no_bar))
        stack.enter_context(_replaced(coreset_module.KCenterGreedy, "update_distances", _update_distances))
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _update_distances(self: Any, cluster_center: Tensor | None) -> None:
    """Compute the distances of `KCenterGreedy.update_distances`, the same to the bit, in memory that is reused.

    anomalib allocates the differences to all features for each of thousands of centers, while a small tensor of each
    center stays. glibc may then put every new block behind the last small one instead of into the freed block: on 31
    images of 256 pixels the process grew beyond 22 GB.
    """
    if cluster_center is None:
        return
    features = self.features
    differences = getattr(self, "_differences", None)
    if differences is None or differences.shape != features.shape:
        differences = self._differences = torch.empty_like(features)
    torch.sub(features, features[cluster_center].squeeze(), out=differences)
    distances = torch.linalg.norm(differences, ord=2, dim=1, keepdim=True)
    self.min_distances = distances if self.min_distances is None else torch.minimum(self.min_distances, distances)


def _no_bar(items: Any, *_: Any, **__: Any) -> Any:
    return items


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def _interrupts(engine: Engine) -> Iterator[None]:
    """Restore the effects of Ctrl-C and SIGTERM.

    Lightning turns the first into an exit, and the second into a flag that it may never read again.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    if engine.trainer.received_sigterm and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.raise_signal(signal.SIGTERM)
