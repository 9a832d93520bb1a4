"""Protocols as files: a table, a sweep or a data set in TOML, read and checked before anything is run.

    kind = "table"                        kind = "sweep"                        kind = "dataset"
    title, note                           title, note, label, logarithmic       title
    dataset = "mvtec"                     dataset = "mvtec"                     [images]
    seeds = [0, 1]                        seeds = [0, 1]                        carpet = { color = 19, cut = 17 }
    methods = ["nfad", "bgad"]            methods = ["bgad"]
    peers = ["padim"]                     references = ["nfad"]
    [row_names]                           categories = ["carpet"]
    "carpet:color" = "carpet:colour"      num_anomalies = 10
    [subset]                              option = "loss.beta"
    carpet = ["color"]                    values = [0.01, 0.1]
    [[setting]]                           or, for several options at once:
    name = "one_class"                    [[point]]
    num_anomalies = 10                    value = "none"
    known = "each"                        overrides = { "anomalies.repeat" = 0 }
    test = "others"                       stand_ins = { bgad = "bgad_without" }
    rows = ["type", "category:mean"]
    categories = ["carpet"]

- known: the types that the known anomalies are drawn from. all; each: every type in turn; subset: those that [subset]
  lists for the category; rest: those that it does not list.
- test: the types whose remaining images are tested beside the normal ones. all; known: the same as above; others: all
  but those.
- rows: category, type (with known = "each"), category:mean (the same as category, under another name), mean.
- references: methods that do not have the option; their points repeat one measurement.
- stand_ins: at this point a method is run as another one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from math import isfinite
from pathlib import Path
from typing import Any, Final, get_args

from ...config import METHOD_NAMES, TrainConfig
from ...errors import ConfigError
from ...wording import choose, did_you_mean
from .cells import PEERS, Dataset, Value
from .checked_toml import CheckedTable, parse_toml
from .setup import with_overrides

NUM_ANOMALIES: Final = "num_anomalies"
"""The one option of a sweep that belongs to the cells and not to the training configuration."""

_KNOWN: Final = ("all", "each", "subset", "rest")
_TEST: Final = ("all", "known", "others")
_ROWS: Final = ("category", "type", "category:mean", "mean")
_DATASET_PREFIX: Final = "dataset_"


@dataclass(frozen=True)
class DatasetFacts:
    """Categories and defect types of a data set, as it is published."""

    title: str
    images: Mapping[str, Mapping[str, int]]
    """Of every category, in the paper's order, the number of anomalous test images of each type."""

    def types(self, category: str) -> tuple[str, ...]:
        """Return the defect types of a category, sorted."""
        return tuple(sorted(self.images[category]))


@dataclass(frozen=True)
class Setting:
    """One setting of a table: which anomalies are known, which types are tested, which rows it has."""

    name: str
    num_anomalies: int
    known: str
    test: str
    rows: tuple[str, ...]
    categories: tuple[str, ...]


@dataclass(frozen=True)
class TableProtocol:
    """A table, as its file describes it."""

    name: str
    title: str
    note: str
    dataset: Dataset
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    peers: tuple[str, ...]
    row_names: Mapping[str, str]
    subset: Mapping[str, tuple[str, ...]]
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class PointProtocol:
    """One value of a sweep, and the changes that it makes."""

    value: Value
    num_anomalies: int | None
    overrides: Mapping[str, Value]
    stand_ins: Mapping[str, str]


@dataclass(frozen=True)
class SweepProtocol:
    """A sweep, as its file describes it."""

    name: str
    title: str
    label: str
    note: str
    logarithmic: bool
    dataset: Dataset
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    references: tuple[str, ...]
    categories: tuple[str, ...]
    num_anomalies: int
    points: tuple[PointProtocol, ...]


def protocol_names(kind: str) -> tuple[str, ...]:
    """Return the names of the package's protocols of a kind: "table" or "sweep"."""
    return tuple(name for name, content in _packaged().items() if content.get("kind") == kind)


def protocol_source(name: str) -> str:
    """Return the text of a protocol's file: one of the package's by its name, or a user's own by its path in .toml.

    Raises:
        ConfigError: there is none of this name, or the file cannot be read.
    """
    path = Path(name)
    if path.suffix == ".toml":
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot read the protocol {path}: {reason}; check the path") from error
    known = [*protocol_names("table"), *protocol_names("sweep")]
    if name not in known:
        raise ConfigError(
            f"there is no protocol {name!r}; {did_you_mean(name, known)}{choose(known)}, or give the path of a .toml "
            "file of your own"
        )
    return (_folder() / f"{name}.toml").read_text(encoding="utf-8")


@functools.cache
def dataset_facts(name: Dataset) -> DatasetFacts:
    """Return the categories of a data set and their types."""
    file = f"{_DATASET_PREFIX}{name}.toml"
    table = CheckedTable(file, parse_toml(file, (_folder() / file).read_text(encoding="utf-8")))
    table.choice("kind", ("dataset",))
    title = table.take("title", str)
    images = {category: dict(types.items_of(int)) for category, types in table.tables("images")}
    table.finish()
    return DatasetFacts(title, images)


def read_protocol(name: str) -> TableProtocol | SweepProtocol:
    """Read and check a protocol, named as in `protocol_source`.

    Raises:
        ConfigError: there is no such protocol, or its file is wrong: an unknown key, method, category, type or option,
            a missing key, or a value of another type. The message names the file.
    """
    file = name if name.endswith(".toml") else f"{name}.toml"
    table = CheckedTable(file, parse_toml(file, protocol_source(name)))
    kind = table.choice("kind", ("table", "sweep"))
    return _read_table(table, Path(file).stem) if kind == "table" else _read_sweep(table, Path(file).stem)


def option_of(config: TrainConfig, name: str) -> Value:
    """Return the value of an option, named by its section, such as "loss.beta"."""
    section, _, option = name.partition(".")
    value: Value = getattr(getattr(config, section), option)
    return value


def _folder() -> Traversable:
    return resources.files(__package__) / "protocols"


@functools.cache
def _packaged() -> dict[str, dict[str, Any]]:
    files = sorted((file for file in _folder().iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): parse_toml(file.name, file.read_text(encoding="utf-8")) for file in files}


def _read_table(table: CheckedTable, name: str) -> TableProtocol:
    dataset: Dataset = table.choice("dataset", get_args(Dataset))  # type: ignore[assignment]
    facts = dataset_facts(dataset)
    subset = {}
    for category, types in table.take("subset", dict, {}).items():
        table.check("a category of [subset]", category, facts.images)
        subset[category] = table.names(f"subset.{category}", types, facts.types(category))
        if len(subset[category]) == len(facts.types(category)):
            raise table.wrong(f"[subset] lists every type of {category}; leave out some, or the whole category")
    protocol = TableProtocol(
        name=name,
        title=table.take("title", str),
        note=table.take("note", str, "").strip(),
        dataset=dataset,
        seeds=table.seeds(),
        methods=table.names("methods", table.take("methods", list), METHOD_NAMES),
        peers=table.names("peers", table.take("peers", list, []), PEERS, at_least=0),
        row_names=dict(table.table("row_names").items_of(str)),
        subset=subset,
        settings=tuple(_read_setting(entry, facts, subset) for entry in table.entries("setting")),
    )
    table.finish()
    if not protocol.settings:
        raise table.wrong("there is no [[setting]]")
    if len({setting.name for setting in protocol.settings}) < len(protocol.settings):
        raise table.wrong("two settings have the same name")
    return protocol


def _read_setting(entry: CheckedTable, facts: DatasetFacts, subset: Mapping[str, Any]) -> Setting:
    name = entry.take("name", str)
    known, test = entry.choice("known", _KNOWN), entry.choice("test", _TEST)
    rows = entry.names("rows", entry.take("rows", list), _ROWS)
    every = tuple(subset) if known in ("subset", "rest") else tuple(facts.images)
    categories = entry.names("categories", entry.take("categories", list, list(every)), facts.images)
    setting = Setting(name, entry.number(NUM_ANOMALIES), known, test, rows, categories)
    entry.finish()
    if known == "all" and test == "others":
        raise entry.wrong('with known = "all" there are no other types to test')
    if known != "each" and "type" in rows:
        raise entry.wrong('rows for each type need known = "each"')
    for category in categories:
        if known in ("subset", "rest") and category not in subset:
            raise entry.wrong(f"[subset] has no types of {category}")
        if known == "each" and test == "others" and len(facts.types(category)) < 2:
            raise entry.wrong(f"{category} has one defect type; there are no others to test")
    return setting


def _read_sweep(table: CheckedTable, name: str) -> SweepProtocol:
    dataset: Dataset = table.choice("dataset", get_args(Dataset))  # type: ignore[assignment]
    methods = table.names("methods", table.take("methods", list), METHOD_NAMES)
    if "option" in table:
        option, values = table.take("option", str), table.take("values", list)
        points = tuple(_read_point(table, None, {option: value}, {}) for value in values)
    else:
        points = tuple(_read_point_entry(entry, methods) for entry in table.entries("point"))
    protocol = SweepProtocol(
        name=name,
        title=table.take("title", str),
        label=table.take("label", str),
        note=table.take("note", str, "").strip(),
        logarithmic=table.take("logarithmic", bool, False),
        dataset=dataset,
        seeds=table.seeds(),
        methods=methods,
        references=table.names("references", table.take("references", list, []), METHOD_NAMES, at_least=0),
        categories=table.names("categories", table.take("categories", list), dataset_facts(dataset).images),
        num_anomalies=table.number(NUM_ANOMALIES),
        points=points,
    )
    table.finish()
    if len(points) < 2 or len({point.value for point in points}) < len(points):
        raise table.wrong("a sweep needs two or more different values (option and values, or several [[point]])")
    numbers = all(isinstance(point.value, int | float) and point.value > 0 for point in points)
    if protocol.logarithmic and not numbers:
        raise table.wrong("logarithmic needs values above 0")
    both = set(methods) & set(protocol.references)
    if both:
        raise table.wrong(f"{', '.join(sorted(both))} cannot be among methods and references")
    return protocol


def _read_point_entry(entry: CheckedTable, methods: tuple[str, ...]) -> PointProtocol:
    value = entry.take("value", (bool, int, float, str))
    overrides = entry.take("overrides", dict)
    stand_ins = dict(entry.table("stand_ins").items_of(str))
    for method, other in stand_ins.items():
        entry.check("a method of stand_ins", method, methods)
        entry.check("a stand-in", other, METHOD_NAMES)
    point = _read_point(entry, value, overrides, stand_ins)
    entry.finish()
    return point


def _read_point(
    table: CheckedTable, value: Value | None, overrides: Mapping[str, Value], stand_ins: Mapping[str, str]
) -> PointProtocol:
    """Return a point; `value` names it, or is None where one option is swept, whose value then names the point."""
    options = dict(overrides)
    known = options.pop(NUM_ANOMALIES, None)
    if known is not None and (type(known) is not int or known < 0):
        raise table.wrong(f"{NUM_ANOMALIES} is {known!r}; give a whole number of at least 0")
    for name, setting in options.items():
        if not isinstance(setting, bool | int | float | str) or (isinstance(setting, float) and not isfinite(setting)):
            raise table.wrong(f"{name} is {setting!r}; give a finite number, a text, true or false")
    try:
        config = with_overrides(TrainConfig(), options)
    except ConfigError as error:
        raise table.wrong(str(error)) from error
    # Read back from the configuration, where a whole number given for a real one has become real.
    typed = {name: option_of(config, name) for name in options}
    if value is None:
        value = next(iter(typed.values())) if known is None else known
    return PointProtocol(value, known, typed, dict(stand_ins))
