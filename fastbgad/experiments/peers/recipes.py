"""Recipes by which methods of other authors are trained, and the options that a cell may change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...errors import ConfigError
from ...wording import did_you_mean
from ..plan import PEERS, Cell

_PREFIX = "peer."
_OPTIONS = ("backbone", "epochs", "batch_size")


@dataclass(frozen=True)
class Recipe:
    """Training of a peer; everything else is anomalib's default."""

    backbone: str | None
    """Network whose features the method uses, anomalib's default; None: the method trains a network of its own."""
    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Training images at a time; test images too, which changes no score."""
    square: bool = False
    """True if images must be square."""
    multiple: int = 1
    """Both sides of an image must be multiples of this."""
    smallest: int = 1
    """Least height and width of an image, in pixels."""
    levels: tuple[int, ...] = ()
    """Feature levels in timm's numbering, the authors' choice: 1, 2, 3 are layer1, layer2, layer3 of a residual
    network, with the strides 4, 8, 16. CFLOW-AD and a CFA on torchvision's networks have levels of their own."""


RECIPES: dict[str, Recipe] = {
    # PaDiM and PatchCore train nothing: one pass collects features.
    "padim": Recipe("resnet18", epochs=1, batch_size=32, levels=(1, 2, 3)),
    "patchcore": Recipe("wide_resnet50_2", epochs=1, batch_size=32, levels=(2, 3)),
    # Epochs and batches of the authors' code. anomalib's CFA resizes its levels to a square.
    "cfa": Recipe("wide_resnet50_2", epochs=30, batch_size=4, square=True, levels=(1, 2, 3)),
    # Epochs and batches of the authors' code. Its networks halve and double the sides five times.
    "draem": Recipe(None, epochs=700, batch_size=8, multiple=32),
    # Batches of the authors' code, epochs and learning rate of anomalib; see `cflow_ad`.
    "cflow_ad": Recipe("wide_resnet50_2", epochs=50, batch_size=32),
    # Epochs and batches of the authors' code. Supervised: see `SplitData` for how often it sees known anomalies. Its
    # noise has up to 32 periods, on a grid of a quarter of the image's sides rounded up to a power of two.
    "supersimplenet": Recipe("wide_resnet50_2.tv_in1k", epochs=300, batch_size=32, smallest=65, levels=(2, 3)),
}
"""The recipe of every method in `PEERS`."""


def recipe_of(cell: Cell) -> Recipe:
    """Return the recipe of a peer's cell, with the cell's overrides: peer.backbone, peer.epochs, peer.batch_size.

    Raises:
        ConfigError: the method is no peer, or an override names no option or has a value that cannot work.
    """
    if cell.method not in RECIPES:
        raise ConfigError(f"{cell.method!r} is no method of another author; those are {', '.join(RECIPES)}")
    recipe = RECIPES[cell.method]
    for name, value in cell.overrides:
        option = name.removeprefix(_PREFIX)
        if option == name or option not in _OPTIONS:
            known = [_PREFIX + each for each in _OPTIONS]
            raise ConfigError(
                f"{PEERS[cell.method]} has no option {name!r}; {did_you_mean(name, known)}there are "
                f"{', '.join(known)}: options of fastbgad's own training do not apply to methods of others"
            )
        recipe = replace(recipe, **{option: _checked(cell.method, name, value)})
    return recipe


def _checked(method: str, name: str, value: Any) -> Any:
    """Return the value of an override; raise `ConfigError` if it cannot work."""
    if name == "peer.backbone":
        if RECIPES[method].backbone is None:
            raise ConfigError(f"{PEERS[method]} has no backbone to choose: leave {name} out")
        if isinstance(value, str) and value:
            return value
        raise ConfigError(f"{name} is {value!r}; give the name of a network, such as resnet18")
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ConfigError(f"{name} is {value!r}; give a whole number of at least 1")
