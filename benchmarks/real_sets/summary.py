"""Means and deviations of results: over seeds on a category, and over categories."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from .grid import CONVERGENCE, GAUSSIAN, METHODS, ONCE, OURS, PEERS
from .results import Result

Figure = Callable[[Result], float]


class Contender(NamedTuple):
    """A method with its features and how it is trained."""

    method: str
    features: str
    size: int
    setting: str

    @property
    def label(self) -> str:
        """The contender for readers."""
        about = [self.features, f"{self.size} px"]
        about += [] if self.setting == ONCE else [self.setting.replace("-", " ")]
        return f"{METHODS[self.method]} ({', '.join(about)})"

    @property
    def order(self) -> tuple[bool, str, int, bool, str, int]:
        """Sort key: fastbgad's methods by features and schedule, the Gaussian after them, then the peers."""
        place = list(METHODS).index(self.method)
        peer = self.method in PEERS
        return peer, self.features, self.size, self.method == GAUSSIAN, "" if peer else self.setting, place


class Spread(NamedTuple):
    """A mean, and the sample deviation where there are at least two values."""

    mean: float
    deviation: float | None

    def text(self, digits: int = 3) -> str:
        """Return the spread for a table, such as 0.981 ± 0.004."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {self.deviation:.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Return mean and deviation of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def measured(results: Iterable[Result]) -> dict[Contender, list[Result]]:
    """Return the results of every contender, in the order of tables; convergence runs are left out."""
    found: dict[Contender, list[Result]] = {}
    for result in results:
        run = result.run
        if run.setting != CONVERGENCE:
            found.setdefault(Contender(run.method, run.features, run.size, run.setting), []).append(result)
    return dict(sorted(found.items(), key=lambda item: item[0].order))


def on_category(results: Iterable[Result], category: str) -> list[Result]:
    """Return the results on one category."""
    return [result for result in results if result.run.category == category]


def over_categories(results: Sequence[Result], categories: Sequence[str], figure: Figure) -> Spread | None:
    """Return the mean over categories of a contender's mean over seeds; None where it lacks a category.

    The deviation is that of the mean over categories between seeds, of the seeds that have all categories.
    """
    of = [[figure(result) for result in on_category(results, category)] for category in categories]
    if not of or not all(of):
        return None
    mean = statistics.fmean(statistics.fmean(values) for values in of)
    by_seed: dict[int, list[float]] = {}
    for result in results:
        if result.run.category in categories:
            by_seed.setdefault(result.run.seed, []).append(figure(result))
    whole = [statistics.fmean(values) for values in by_seed.values() if len(values) == len(categories)]
    return Spread(mean, statistics.stdev(whole) if len(whole) > 1 else None)


def shared_categories(found: Mapping[Contender, Sequence[Result]]) -> list[str]:
    """Return the categories that means are taken over: the largest block of results without a gap.

    Contenders that were measured on some categories alone would otherwise leave all others without a mean. The block
    has the most contenders times categories; of two as large, the one with more categories counts.
    """
    measured_on = [frozenset(result.run.category for result in results) for results in found.values()]
    # A contender's own categories, and what several have in common: no other block can be the largest.
    blocks = set(measured_on)
    for categories in measured_on:
        blocks |= {block & categories for block in blocks}
    blocks.discard(frozenset())

    def size(block: frozenset[str]) -> tuple[int, int, list[str]]:
        contenders = sum(block <= categories for categories in measured_on)
        return contenders * len(block), len(block), sorted(block)

    return sorted(max(blocks, key=size)) if blocks else []


def total_seconds(result: Result) -> float:
    """Return the seconds of training and of scoring the test images together."""
    return result.training_seconds + result.scoring_seconds


def headline(found: dict[Contender, list[Result]], categories: Sequence[str]) -> list[Contender]:
    """Return five contenders for a short table: BGAD with its best features, NFAD and the Gaussian on the same, and the
    two best peers. "Best" is by the mean image AUROC over all categories; contenders that lack one are left out."""

    def image(contender: Contender) -> float:
        mean = over_categories(found[contender], categories, lambda result: result.metrics["image_auroc"])
        return -1.0 if mean is None else mean.mean

    whole = [contender for contender in found if image(contender) >= 0]
    chosen: list[Contender] = []
    for method in reversed(OURS):  # BGAD first
        ours = [c for c in whole if c.method == method and (not chosen or c[1:] == chosen[0][1:])]
        if ours and method != "bgad_without":
            chosen.append(max(ours, key=image))
    floor = [c for c in whole if c.method == GAUSSIAN and (not chosen or c[1:3] == chosen[0][1:3])]
    peers = sorted((c for c in whole if c.method in PEERS), key=image, reverse=True)
    return [*chosen, *floor[:1], *peers[:2]]
