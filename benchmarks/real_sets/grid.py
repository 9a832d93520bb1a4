"""Names every run: which contender on which category with which features and seed, and where its result lies."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from fastbgad.errors import ConfigError

from .backbones import features_named

OURS = {"nfad": "NFAD", "bgad_without": "BGAD w/o", "bgad": "BGAD"}
GAUSSIAN = "gaussian"
PEERS = {"patchcore": "PatchCore", "padim": "PaDiM", "cfa": "CFA", "supersimplenet": "SuperSimpleNet"}
METHODS = {**OURS, GAUSSIAN: "Gaussian per level", **PEERS}
LEFT_OUT = {
    "efficientad": "EfficientAD-S: anomalib downloads its teacher's weights and the images of ImageNette when it is "
    "trained, and takes neither from a package or an offline cache",
}
"""Methods that a reader may miss, and why they are not measured."""
LEARN_FROM_ANOMALIES = ("bgad", "supersimplenet")
TRAINED_PEERS = ("cfa", "supersimplenet")
"""Peers that take passes over the training images, so that their epochs are part of a result's name."""
ONCE, CONVERGENCE = "once", "convergence"


@dataclass(frozen=True)
class Run:
    """One contender on one category, trained and measured with one seed."""

    category: str
    features: str
    """See `backbones.features_named`."""
    size: int
    """Height and width of the images, in pixels."""
    setting: str
    """How it is trained: a preset of fastbgad, "7-epochs" of a peer, "once" where nothing is trained by passes, or
    "convergence"."""
    method: str
    seed: int

    @property
    def path(self) -> PurePosixPath:
        """Path of the run's result below the folder of all results."""
        folder = f"{self.features}-{self.size}-{self.setting}"
        return PurePosixPath(self.category, folder, f"{self.method}-seed{self.seed}.json")

    @property
    def key(self) -> str:
        """A name fit for a claim's file."""
        return "__".join(self.path.with_suffix("").parts)

    @property
    def group(self) -> tuple[str, str, int]:
        """Key that runs share if they use the same features of the same images."""
        return self.category, self.features, self.size

    @property
    def title(self) -> str:
        """The run for readers."""
        about = f"{self.features}, {self.size} px"
        about += "" if self.setting == ONCE else f", {self.setting.replace('-', ' ')}"
        return f"{self.category}: {METHODS[self.method]} ({about}), seed {self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def setting_of(method: str, schedule: str, peer_epochs: int) -> str:
    """Return how a method is trained, as `Run.setting` has it."""
    if method in OURS:
        return schedule
    return f"{peer_epochs}-epochs" if method in TRAINED_PEERS else ONCE


def plan(
    categories: Iterable[str],
    features: Sequence[str],
    sizes: Sequence[int],
    schedules: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    peer_epochs: int,
) -> list[Run]:
    """Return all runs, those that share features together; peers take part with features of timm's backbones only.

    A peer's own extractor gives raw features, so `lite0` and `lite0-raw` would be the same to it: it runs once for all
    that differ in how features are standardized.
    """
    runs: dict[Run, None] = {}
    for category in categories:
        for name in features:
            short = features_named(name).short
            twin = name != next(each for each in features if features_named(each).short == short)
            for size in sizes:
                # Schedules outside: they differ in how patches are labelled, so each has its own store of features.
                for schedule, seed, method in itertools.product(schedules, seeds, methods):
                    if method in PEERS and (twin or short == "gabor"):
                        continue
                    setting = setting_of(method, schedule, peer_epochs)
                    runs.setdefault(Run(category, name, size, setting, method, seed))
    return list(runs)


def plan_convergence(
    categories: Iterable[str], features: Sequence[str], sizes: Sequence[int], seeds: Sequence[int]
) -> list[Run]:
    """Return the runs whose accuracy is measured after every meta epoch: BGAD with every kind of features."""
    return [
        Run(category, name, size, CONVERGENCE, "bgad", seed)
        for category in categories
        for name in features
        for size in sizes
        for seed in seeds
    ]


def checked(kind: str, given: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the given names without repetition; raises `ConfigError` naming one that is not known."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(f"there is no {kind} {name!r}; choose from {', '.join(known)}")
    return list(dict.fromkeys(given))
