"""From a protocol to its plan: which cells a table or a sweep consists of.

The paper's tables and this package's sweeps are the files of `protocols/`; `protocol_file` says how one is written. A
path that ends in .toml names a user's own file wherever a name is expected. A table whose file is named as one of
published.csv is compared with its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

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
    """The names of the paper's tables, in its order."""
    return TABLES


def sweep_names() -> tuple[str, ...]:
    """The names of the sweeps."""
    return protocol_names("sweep")


def names() -> tuple[str, ...]:
    """The names of all tables and sweeps."""
    return table_names() + sweep_names()


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
    """The plan of a table or a sweep.

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
    if isinstance(protocol, SweepProtocol):
        return _sweep_plan(protocol, seeds, chosen, methods, num_anomalies, training)
    return _table_plan(protocol, facts, seeds, chosen, methods, peers, num_anomalies)


def _table_plan(
    protocol: TableProtocol,
    facts: DatasetFacts,
    seeds: tuple[int, ...],
    categories: tuple[str, ...] | None,
    methods: Sequence[str] | None,
    peers: bool,
    num_anomalies: int | None,
) -> TablePlan:
    runnable = protocol.methods + (protocol.peers if peers else ())
    chosen = _chosen_methods(protocol.name, methods, runnable, () if peers else protocol.peers)
    rows = []
    for setting in protocol.settings:
        own = [name for name in setting.categories if categories is None or name in categories]
        count = setting.num_anomalies if num_anomalies is None else num_anomalies
        for row, drawn in _rows(setting, own, facts, protocol.subset):
            for method in chosen:
                cells = tuple(
                    Cell(protocol.dataset, category, method, seed, count, known, test)
                    for category, known, test in drawn
                    for seed in (seeds[:1] if method in PEERS else seeds)
                )
                whole = row != "mean" or len(own) == len(setting.categories)
                comparable = whole and count == setting.num_anomalies
                name = protocol.row_names.get(row, row)
                rows.append(RowPlan(setting.name, name, _WRITTEN[method], cells, comparable))
    if not rows:
        theirs = dict.fromkeys(category for setting in protocol.settings for category in setting.categories)
        raise ConfigError(f"{protocol.name} has none of the categories chosen; it has {', '.join(theirs)}")
    notes = [protocol.note]
    if categories is not None and any(set(s.categories) - set(categories) for s in protocol.settings):
        notes.append(
            f"Run for {', '.join(categories)} only: means are over these, the published ones over all categories."
        )
    if num_anomalies is not None and any(setting.num_anomalies != num_anomalies for setting in protocol.settings):
        usual = ", ".join(str(number) for number in sorted({setting.num_anomalies for setting in protocol.settings}))
        notes.append(f"Run with {num_anomalies} known anomalies; the published numbers are for {usual}.")
    return TablePlan(protocol.name, protocol.title, " ".join(filter(None, notes)), protocol.dataset, tuple(rows))


_Drawn = tuple[str, tuple[str, ...] | None, tuple[str, ...] | None]  # category, known types, test types


def _rows(
    setting: Setting, categories: Iterable[str], facts: DatasetFacts, subset: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, list[_Drawn]]]:
    """The rows of a setting in the paper's order: each category's types, its mean, and the mean over all."""
    everything: list[_Drawn] = []
    for category in categories:
        every = facts.types(category)
        listed = subset.get(category, ())
        known_types: tuple[tuple[str, ...] | None, ...] = {
            "all": (None,),
            "each": tuple((defect,) for defect in every),
            "subset": (tuple(sorted(listed)),),
            "rest": (tuple(defect for defect in every if defect not in listed),),
        }[setting.known]
        drawn: list[_Drawn] = []
        for known in known_types:
            others = None if known is None else tuple(defect for defect in every if defect not in known)
            drawn.append((category, known, {"all": None, "known": known, "others": others}[setting.test]))
        if "type" in setting.rows:
            yield from ((f"{category}:{one[1][0]}", [one]) for one in drawn if one[1])
        if "category" in setting.rows:
            yield category, drawn
        if "category:mean" in setting.rows:
            yield f"{category}:mean", drawn
        everything += drawn
    if "mean" in setting.rows and everything:
        yield "mean", everything


def _sweep_plan(
    protocol: SweepProtocol,
    seeds: tuple[int, ...],
    categories: tuple[str, ...] | None,
    methods: Sequence[str] | None,
    num_anomalies: int | None,
    training: TrainConfig | None,
) -> SweepPlan:
    if num_anomalies is not None and any(point.num_anomalies is not None for point in protocol.points):
        raise ConfigError(f"{protocol.name} varies the number of known anomalies; do not give num_anomalies with it")
    chosen = _chosen_methods(protocol.name, methods, protocol.methods + protocol.references, ())
    usual = protocol.num_anomalies if num_anomalies is None else num_anomalies
    points = []
    for method in chosen:
        for point in protocol.points:
            overrides = () if method in protocol.references else _overrides(point, training)
            known = usual if point.num_anomalies is None else point.num_anomalies
            cells = tuple(
                Cell(
                    protocol.dataset, category, point.stand_ins.get(method, method), seed, known,
                    overrides=overrides,
                )
                for category in categories or protocol.categories
                for seed in seeds
            )  # fmt: skip
            points.append(SweepPoint(method, point.value, cells))
    note = protocol.note
    if num_anomalies is not None and num_anomalies != protocol.num_anomalies:
        note = f"{note} Run with {num_anomalies} known anomalies.".strip()
    return SweepPlan(
        protocol.name, protocol.title, protocol.label, note, protocol.dataset, protocol.logarithmic, tuple(points)
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
    """The methods to run, in the protocol's order; `unasked_peers` are those it has but was not asked to run."""
    if methods is None:
        return runnable
    wanted = {RUNNABLE.get(name, name) for name in methods}
    for name in sorted(wanted):
        if name not in METHOD_NAMES and name not in PEERS:
            known = [*METHOD_NAMES, *PEERS]
            raise ConfigError(f"there is no method {name!r}; {did_you_mean(name, known)}{choose(known)}")
        if name in unasked_peers:
            raise ConfigError(f"{name} is a method of other authors; ask for peers as well (peers=True, --peers)")
    chosen = tuple(name for name in runnable if name in wanted)
    if not chosen:
        raise ConfigError(f"{protocol} has none of the methods chosen; it can run {', '.join(runnable)}")
    return chosen
