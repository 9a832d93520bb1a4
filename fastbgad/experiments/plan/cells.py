"""A cell: one measurement of one method, the unit that tables consist of and that is run, stored and resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ...config import METHOD_NAMES
from ...errors import ConfigError, check_choice

Dataset = Literal["mvtec", "btad"]
Value = bool | int | float | str

PEERS: dict[str, str] = {
    "cflow_ad": "CFLOW-AD",
    "padim": "PaDiM",
    "patchcore": "PatchCore",
    "cfa": "CFA",
    "draem": "DRAEM",
    "supersimplenet": "SuperSimpleNet",
}
"""Methods of other authors that can be run here, and their names in the tables."""

METRICS: dict[str, str] = {"image_auroc": "Image AUROC", "pixel_auroc": "Pixel AUROC", "aupro": "AUPRO"}
"""The metrics of a cell, each in [0, 1], and their names in headings."""

# File systems limit the length of a name, and a dataset's types may have any.
_LONGEST_PART = 40


@dataclass(frozen=True)
class Cell:
    """One method, trained on one category with one seed, and measured on one choice of its test images.

    The known anomalies are drawn from `known_types` with the cell's seed and leave the test set for every method, also
    for those that do not learn from them, so that all methods are measured on the same images.
    """

    dataset: Dataset
    category: str
    method: str
    """A method of `fastbgad.config.METHOD_NAMES` or of `PEERS`."""
    seed: int = 0
    num_anomalies: int = 10
    """Known anomalies, in total."""
    known_types: tuple[str, ...] | None = None
    """Defect types that the known anomalies are drawn from; None: all."""
    test_types: tuple[str, ...] | None = None
    """Defect types whose remaining images are tested beside the normal ones; None: all."""
    overrides: tuple[tuple[str, Value], ...] = ()
    """Changes of the run's training configuration, such as (("loss.beta", 0.05),), sorted by name."""

    def __post_init__(self) -> None:
        check_choice("the dataset", self.dataset, Dataset)
        check_choice("the method", self.method, [*METHOD_NAMES, *PEERS])
        if self.seed < 0 or self.num_anomalies < 0:
            raise ConfigError(f"seed is {self.seed} and num_anomalies {self.num_anomalies}; give at least 0")
        for name in ("known_types", "test_types"):
            types = getattr(self, name)
            if types is not None and (not types or list(types) != sorted(set(types))):
                raise ConfigError(f"{name} is {types!r}; give names of defect types, sorted, each once, or None")
        if list(self.overrides) != sorted(dict(self.overrides).items()):
            raise ConfigError(f"overrides are {self.overrides!r}; sort them by name, each once")

    @property
    def is_peer(self) -> bool:
        """True for a method of other authors."""
        return self.method in PEERS

    @property
    def learns_from_anomalies(self) -> bool:
        """True for a method that trains on the known anomalies."""
        return self.method in ("bgad", "bgad_dagger", "supersimplenet")

    @property
    def key(self) -> str:
        """A unique, readable name that can be a file name."""
        return self._name(self.as_dict())

    @property
    def training_key(self) -> str:
        """A name that cells share if one training serves them: if they only differ in what they are tested on."""
        facts = self.as_dict()
        del facts["test_types"]
        if not self.learns_from_anomalies:
            del facts["num_anomalies"], facts["known_types"]
        return self._name(facts)

    def _name(self, facts: Mapping[str, Any]) -> str:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
        parts = [self.dataset, self.category, self.method, f"seed{self.seed}"]
        readable = "-".join(part.replace("/", "_")[:_LONGEST_PART] for part in parts)
        return f"{readable}-{digest}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        facts = asdict(self)
        facts["overrides"] = dict(self.overrides)
        return facts

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Cell:
        """Return the cell that `as_dict` described.

        Raises:
            ConfigError, TypeError, KeyError, AttributeError: it is something else.
        """
        values = dict(facts)
        for name in ("known_types", "test_types"):
            values[name] = None if values[name] is None else tuple(values[name])
        values["overrides"] = tuple(sorted(values["overrides"].items()))
        return cls(**values)


@dataclass(frozen=True)
class CellResult:
    """Metrics of a cell, named as in `METRICS`, in [0, 1].

    Attributes:
        cell: the measured cell.
        last: the metrics after the last meta epoch.
        best: each metric's largest value over all meta epochs, as the official code selects them on the test set; None
            for methods that are measured once.
        epochs: the metrics after every meta epoch; empty where there is none.
        seconds: wall time of the training and its measurements; cells that share a training share this.
        known_anomalies: names of the known anomalies, which left the test set.
        n_test: how many test images were measured, and n_anomalous of them anomalous.
        facts: about the run, such as machine, versions and the number of parameters.
    """

    cell: Cell
    last: dict[str, float]
    best: dict[str, float] | None
    epochs: list[dict[str, float]]
    seconds: float
    known_anomalies: list[str]
    n_test: int
    n_anomalous: int
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self) | {"cell": self.cell.as_dict()}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> CellResult:
        """Return the result that `as_dict` described.

        Raises:
            ConfigError, TypeError, KeyError, AttributeError: it is something else.
        """
        values = dict(facts)
        values["cell"] = Cell.from_dict(values["cell"])
        result = cls(**values)
        for metrics in (result.last, *([] if result.best is None else [result.best])):
            if set(metrics) != set(METRICS) or not all(0 <= value <= 1 for value in metrics.values()):
                raise ConfigError(f"the metrics {metrics} are not {', '.join(METRICS)} between 0 and 1")
        return result
