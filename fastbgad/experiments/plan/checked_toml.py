"""A table of a TOML file that is checked as it is read: types, choices, and unknown keys."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ...errors import ConfigError
from ...wording import choose, did_you_mean

T = TypeVar("T")


def parse_toml(file: str, text: str) -> dict[str, Any]:
    """Return the content of a TOML file; raise `ConfigError` with the file's name where it is not valid."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the protocol {file} is not valid TOML: {error}") from error


class CheckedTable:
    """A TOML table from which each key is taken; `finish` raises an error for keys that are left."""

    def __init__(self, file: str, content: Mapping[str, Any], where: str = "") -> None:
        self._file, self._where = file, where
        self._content = dict(content)
        self._asked: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def wrong(self, what: str) -> ConfigError:
        """Return an error that names the file and the table in it."""
        return ConfigError(f"the protocol {self._file}{self._where}: {what}")

    def take(self, key: str, kind: type[T] | tuple[type[Any], ...], default: Any = None) -> Any:
        """Return the value of a key of this type (a bool is no int); without a default the key is required."""
        self._asked.append(key)
        if key not in self._content:
            if default is None:
                raise self.wrong(f"the key {key!r} is missing")
            return default
        value = self._content.pop(key)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:
            raise self.wrong(f"{key} is {value!r}; it is of type {' or '.join(one.__name__ for one in kinds)}")
        return value

    def choice(self, key: str, known: Iterable[str]) -> str:
        """Return the value of a key, which must be one of the known ones."""
        value: str = self.take(key, str)
        self.check(key, value, known)
        return value

    def number(self, key: str) -> int:
        """Return the value of a key, which must be a whole number of at least 0."""
        value: int = self.take(key, int)
        if value < 0:
            raise self.wrong(f"{key} is {value}; give at least 0")
        return value

    def seeds(self) -> tuple[int, ...]:
        """Return the seeds, which must be different whole numbers of at least 0."""
        seeds = self.take("seeds", list)
        if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
            raise self.wrong(f"seeds are {seeds!r}; give different whole numbers of at least 0")
        return tuple(seeds)

    def check(self, what: str, value: str, known: Iterable[str]) -> None:
        """Raise `ConfigError` unless the value is one of the known ones."""
        known = list(known)
        if value not in known:
            raise self.wrong(f"{what} is {value!r}; {did_you_mean(str(value), known)}{choose(known)}")

    def names(self, key: str, values: Any, known: Iterable[str], at_least: int = 1) -> tuple[str, ...]:
        """Return the values, which must be a list of known names, each once."""
        known = list(known)
        if not isinstance(values, list) or len(values) < at_least or any(not isinstance(name, str) for name in values):
            raise self.wrong(f"{key} is {values!r}; give a list of names from {', '.join(known)}")
        for name in values:
            self.check(key, name, known)
        if len(set(values)) < len(values):
            raise self.wrong(f"{key} names something twice: {', '.join(values)}")
        return tuple(values)

    def table(self, key: str) -> CheckedTable:
        """Return the table of a key, an empty one where there is none."""
        return CheckedTable(self._file, self.take(key, dict, {}), f"{self._where}, [{key}]")

    def tables(self, key: str) -> list[tuple[str, CheckedTable]]:
        """Return the names and tables of a table of tables."""
        inner = self.table(key)
        return [(name, inner.table(name)) for name in list(inner._content)]

    def entries(self, key: str) -> list[CheckedTable]:
        """Return the tables of an array of tables."""
        entries = self.take(key, list, [])
        if any(not isinstance(entry, dict) for entry in entries):
            raise self.wrong(f"{key} must be written as [[{key}]]")
        return [
            CheckedTable(self._file, entry, f"{self._where}, [[{key}]] number {index}")
            for index, entry in enumerate(entries, 1)
        ]

    def items_of(self, kind: type[T]) -> list[tuple[str, T]]:
        """Return all items, whose values must be of this type."""
        return [(name, self.take(name, kind)) for name in list(self._content)]

    def finish(self) -> None:
        """Raise `ConfigError` for a key that was not taken."""
        for key in self._content:
            asked = list(dict.fromkeys(self._asked))
            raise self.wrong(f"the key {key!r} is unknown; {did_you_mean(key, asked)}known here: {', '.join(asked)}")
