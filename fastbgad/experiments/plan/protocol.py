"""Plans from protocols: the cells that a table or a sweep consists of.

The paper's tables and this package's sweeps are the files of `protocols/`; `protocol_file` says how one is written. A
path that ends in .toml names a user's own file wherever a name is expected. A table whose file is named as one of
published.csv is compared with its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ...config import METHOD_NAMES, TrainConfig
from ...errors import ConfigError
from ...wording import choose, did_you_mean
from .cells import PEERS, Cell, Value
from .plan import RowPlan, SweepPlan, SweepPoint, TablePlan
from .protocol_file import (
    DatasetFacts,
    PointProtocol,
    Setting,
    SweepProtocol,
    TableProtocol,
    dataset_facts,
    option_of,
    protocol_names,
    read_protocol,
)
from .published import RUNNABLE, TABLES

_WRITTEN = {method: written for written, method in RUNNABLE.items()}


def table_names() -> tuple[str, ...]:
    """Return the names of the paper's tables, in its order."""
    return TABLES


def sweep_names() -> tuple[str, ...]:
    """Return the names of the sweeps."""
    return protocol_names("sweep")


def names() -> tuple[str, ...]:
    """Return the names of all tables and sweeps."""
    return table_names() + sweep_names()


class _Choices(NamedTuple):
    """Arguments of `make_plan`, checked."""

    seeds: tuple[int, ...]
    categories: tuple[str, ...] | None
    methods: Sequence[str] | None
    peers: bool
    num_anomalies: int | None
    training: TrainConfig | None


def make_plan(
    name: str,
    *,
    seeds: Sequence[int] | None = None,
    categories: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    peers: bool = False,
    num_anomalies: int | None = None,
    training: TrainConfig | None = None,
) -> TablePlan | SweepPlan:
    """Return the plan of a table or a sweep.

    Args:
        name: one of `names()`, or the path of a .toml file.
        seeds: of the trainings and of the draws of known anomalies; those of the protocol if None. Peers run with the
            first.
        categories: only these, as their folders are called; means are then over fewer categories than the paper's. A
            sweep may take any of its data set in place of its own choice.
        methods: only these, named as in `Cell.method` or as in the tables.
        peers: run those methods of other authors that can be run here.
        num_anomalies: the number of known anomalies of every cell, in place of the protocol's.
        training: the configuration that the run starts from. Where a sweep's value is the configuration's own, its
            cells are then those of the tables, and are not run twice.

    Raises:
        ConfigError: an unknown protocol, category or method, seeds that are not different numbers of at least 0, or a
            choice that leaves nothing to run; or the protocol's file is wrong.
    """
    protocol = read_protocol(name)
    facts = dataset_facts(protocol.dataset)
    seeds = _checked_seeds(protocol.seeds if seeds is None else seeds)
    chosen = None if categories is None else _checked_categories(categories, facts)
    if num_anomalies is not None and num_anomalies < 0:
        raise ConfigError(f"num_anomalies is {num_anomalies}; give at least 0")
    choices = _Choices(seeds, chosen, methods, peers, num_anomalies, training)
    if isinstance(protocol, SweepProtocol):
        return _sweep_plan(protocol, choices)
    return _table_plan(protocol, facts, choices)


def _table_plan(protocol: TableProtocol, facts: DatasetFacts, choices: _Choices) -> TablePlan:
    runnable = protocol.methods + (protocol.peers if choices.peers else ())
    not_asked_for = () if choices.peers else protocol.peers
    methods = _chosen_methods(protocol.name, choices.methods, runnable, not_asked_for)
    rows = [row for setting in protocol.settings for row in _setting_rows(protocol, setting, facts, choices, methods)]
    if not rows:
        known = dict.fromkeys(category for setting in protocol.settings for category in setting.categories)
        raise ConfigError(f"{protocol.name} has none of the categories chosen; it has {', '.join(known)}")
    note = _table_note(protocol, choices)
    return TablePlan(protocol.name, protocol.title, note, protocol.dataset, tuple(rows))


def _setting_rows(
    protocol: TableProtocol, setting: Setting, facts: DatasetFacts, choices: _Choices, methods: Sequence[str]
) -> Iterator[RowPlan]:
    """Yield the rows of a setting, each for every method."""
    categories = [name for name in setting.categories if choices.categories is None or name in choices.categories]
    num_anomalies = setting.num_anomalies if choices.num_anomalies is None else choices.num_anomalies
    for row, draws in _rows(setting, categories, facts, protocol.subset):
        is_whole = row != "mean" or len(categories) == len(setting.categories)
        comparable = is_whole and num_anomalies == setting.num_anomalies
        for method in methods:
            cells = tuple(
                Cell(protocol.dataset, category, method, seed, num_anomalies, known_types, test_types)
                for category, known_types, test_types in draws
                for seed in (choices.seeds[:1] if method in PEERS else choices.seeds)
            )
            name = protocol.row_names.get(row, row)
            yield RowPlan(setting.name, name, _WRITTEN[method], cells, comparable)


def _table_note(protocol: TableProtocol, choices: _Choices) -> str:
    """Return the protocol's note, and in what the choices differ from the published numbers."""
    settings, categories, num_anomalies = protocol.settings, choices.categories, choices.num_anomalies
    notes = [protocol.note]
    if categories is not None and any(set(setting.categories) - set(categories) for setting in settings):
        notes.append(
            f"Run for {', '.join(categories)} only: means are over these, the published ones over all categories."
        )
    if num_anomalies is not None and any(setting.num_anomalies != num_anomalies for setting in settings):
        usual = ", ".join(str(number) for number in sorted({setting.num_anomalies for setting in settings}))
        notes.append(f"Run with {num_anomalies} known anomalies; the published numbers are for {usual}.")
    return " ".join(filter(None, notes))


class _Draw(NamedTuple):
    """A category with the types that known anomalies are drawn from and the types that are tested, None for all."""

    category: str
    known_types: tuple[str, ...] | None
    test_types: tuple[str, ...] | None


def _rows(
    setting: Setting, categories: Iterable[str], facts: DatasetFacts, subset: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, list[_Draw]]]:
    """Yield the rows of a setting in the paper's order: each category's types, its mean, and the mean over all."""
    all_draws: list[_Draw] = []
    for category in categories:
        draws = _draws(setting, category, facts.types(category), subset.get(category, ()))
        if "type" in setting.rows:
            yield from ((f"{category}:{draw.known_types[0]}", [draw]) for draw in draws if draw.known_types)
        if "category" in setting.rows:
            yield category, draws
        if "category:mean" in setting.rows:
            yield f"{category}:mean", draws
        all_draws += draws
    if "mean" in setting.rows and all_draws:
        yield "mean", all_draws


def _draws(setting: Setting, category: str, types: tuple[str, ...], subset: tuple[str, ...]) -> list[_Draw]:
    """Return the draws of a setting from one category, which has these types, of which `subset` are listed."""
    known_types: tuple[tuple[str, ...] | None, ...] = {
        "all": (None,),
        "each": tuple((defect,) for defect in types),
        "subset": (tuple(sorted(subset)),),
        "rest": (tuple(defect for defect in types if defect not in subset),),
    }[setting.known]
    draws = []
    for known in known_types:
        others = None if known is None else tuple(defect for defect in types if defect not in known)
        draws.append(_Draw(category, known, {"all": None, "known": known, "others": others}[setting.test]))
    return draws


def _sweep_plan(protocol: SweepProtocol, choices: _Choices) -> SweepPlan:
    num_anomalies = choices.num_anomalies
    if num_anomalies is not None and any(point.num_anomalies is not None for point in protocol.points):
        raise ConfigError(f"{protocol.name} varies the number of known anomalies; do not give num_anomalies with it")
    methods = _chosen_methods(protocol.name, choices.methods, protocol.methods + protocol.references, ())
    points = [
        SweepPoint(method, point.value, _point_cells(protocol, point, method, choices))
        for method in methods
        for point in protocol.points
    ]
    note = protocol.note
    if num_anomalies is not None and num_anomalies != protocol.num_anomalies:
        note = f"{note} Run with {num_anomalies} known anomalies.".strip()
    return SweepPlan(
        protocol.name, protocol.title, protocol.label, note, protocol.dataset, protocol.logarithmic, tuple(points)
    )


def _point_cells(protocol: SweepProtocol, point: PointProtocol, method: str, choices: _Choices) -> tuple[Cell, ...]:
    """Return the cells of a method at one point of a sweep."""
    overrides = () if method in protocol.references else _overrides(point, choices.training)
    known = protocol.num_anomalies if choices.num_anomalies is None else choices.num_anomalies
    if point.num_anomalies is not None:
        known = point.num_anomalies
    run_as = point.stand_ins.get(method, method)
    return tuple(
        Cell(protocol.dataset, category, run_as, seed, known, overrides=overrides)
        for category in choices.categories or protocol.categories
        for seed in choices.seeds
    )


def _overrides(point: PointProtocol, training: TrainConfig | None) -> tuple[tuple[str, Value], ...]:
    return tuple(
        (name, value)
        for name, value in sorted(point.overrides.items())
        if training is None or option_of(training, name) != value
    )


def _checked_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds are {list(seeds)}; give different numbers of at least 0")
    return tuple(seeds)


def _checked_categories(categories: Sequence[str], facts: DatasetFacts) -> tuple[str, ...]:
    for name in categories:
        if name not in facts.images:
            known = list(facts.images)
            raise ConfigError(
                f"{facts.title} has no category {name!r}; {did_you_mean(name, known)}it has {', '.join(known)}"
            )
    if not categories:
        raise ConfigError("no category was chosen; name some, or leave the choice out")
    # In the paper's order, each once.
    return tuple(name for name in facts.images if name in categories)


def _chosen_methods(
    protocol: str, methods: Sequence[str] | None, runnable: tuple[str, ...], unasked_peers: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the methods to run, in the protocol's order; `unasked_peers` are peers it has but was not asked to run."""
    if methods is None:
        return runnable
    asked = {RUNNABLE.get(name, name) for name in methods}
    for name in sorted(asked):
        if name not in METHOD_NAMES and name not in PEERS:
            known = [*METHOD_NAMES, *PEERS]
            raise ConfigError(f"there is no method {name!r}; {did_you_mean(name, known)}{choose(known)}")
        if name in unasked_peers:
            raise ConfigError(f"{name} is a method of other authors; ask for peers as well (peers=True, --peers)")
    chosen = tuple(name for name in runnable if name in asked)
    if not chosen:
        raise ConfigError(f"{protocol} has none of the methods chosen; it can run {', '.join(runnable)}")
    return chosen
