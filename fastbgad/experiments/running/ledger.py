"""The folder of a run: results, claims and failures, safe for any number of processes.

    OUT/
      setup.json               the run's Setup; a folder holds results of one setup
      cells/CELL.json          one result each
      claims/TRAINING.N        see `claims`
      failed/TRAINING.json     the last error of a training
      pictures/CELL.npz        maps for the qualitative figure
      launches/*.json          the options, machine and versions of each command
      manifest.json            all launches together

Every file is written atomically, and a result is a file named after its cell: if two processes compute the same cell,
the second file replaces the first. A process that is killed leaves no partial results.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...system.files import create_new, make_folder, write_json
from ...wording import listed
from ..plan import Cell, CellResult, Setup
from .claims import HEARTBEAT, LIMIT, Claim, Claims

SETUP_FILE = "setup.json"
MANIFEST_FILE = "manifest.json"
_DIFFERENCES_SHOWN = 8
_UNFIT = (ValueError, TypeError, KeyError, AttributeError, ConfigError)
_PATIENCE = 10  # tenths of a second


@dataclass(frozen=True)
class Failure:
    """A training that failed, and the error."""

    training_key: str
    message: str
    when: float
    """Seconds on the clock of `Ledger.clock`."""


class Ledger:
    """Results, claims and failures of a run, in a folder that other processes may use at the same time.

    Args:
        folder: made where it is missing.
        setup: of all results in the folder.
        read_only: make, rename and write nothing; a missing folder is an empty one.
        heartbeat, limit: of the claims, in seconds.

    Raises:
        ConfigError: the folder holds results of another setup, or its setup.json cannot be read.
        OutputError: the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: str | Path,
        setup: Setup,
        *,
        read_only: bool = False,
        heartbeat: float = HEARTBEAT,
        limit: float = LIMIT,
    ) -> None:
        self.folder: Path = Path(folder)
        self.setup: Setup = setup
        self.read_only: bool = read_only
        self.cells: Path = self.folder / "cells"
        self.failed: Path = self.folder / "failed"
        self.pictures: Path = self.folder / "pictures"
        self.claims: Claims = Claims(self.folder / "claims", heartbeat, limit)
        if not read_only:
            for part in (self.cells, self.failed, self.pictures, self.claims.folder):
                make_folder(part)
            content = json.dumps(setup.as_dict(), indent=2) + "\n"
            create_new(self.folder / SETUP_FILE, content.encode())
        self._check_setup()

    def _check_setup(self) -> None:
        path = self.folder / SETUP_FILE
        try:
            folder_setup = _read_patiently(path)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}); remove it and repeat the command: results of another setup are then "
                "set aside, because each of them knows its own"
            ) from error
        differences = _differences(folder_setup, self.setup.as_dict())
        if differences:
            raise ConfigError(
                f"{self.folder} holds results of another setup, and results of two setups cannot share a table: "
                f"{listed(differences, _DIFFERENCES_SHOWN, '; ')}; give the options of that folder, or another folder "
                "with --out"
            )

    def results(self, cells: Iterable[Cell]) -> dict[Cell, CellResult]:
        """Return the results of those cells that have one, in the order of `cells`.

        A file that is damaged, or holds another cell or setup, is named in a warning, renamed to *.damaged (unless the
        ledger is read-only), and counts as missing.
        """
        results = {}
        for cell in cells:
            result = self._read(cell)
            if result is not None:
                results[cell] = result
        return results

    def everything(self) -> list[CellResult]:
        """Return all results of this setup, of whatever cells; files that cannot be used are skipped."""
        results = []
        for path in sorted(self.cells.glob("[!.]*.json")):
            with contextlib.suppress(OSError, *_UNFIT):
                result, digest = _parse(path.read_text())
                if digest == self.setup.digest:
                    results.append(result)
        return results

    def missing(self, cells: Iterable[Cell]) -> tuple[Cell, ...]:
        """Return the cells without a result file. Much quicker than `results`, because no file is read."""
        try:
            names = set(os.listdir(self.cells))
        except FileNotFoundError:
            names = set()
        return tuple(cell for cell in cells if _file_name(cell) not in names)

    def write(self, result: CellResult) -> None:
        """Write a result, in place of an earlier one, and forget an earlier failure of its training.

        Raises:
            ConfigError: a metric is not between 0 and 1, so that the file could not be read again.
            OutputError: the file cannot be written.
        """
        facts = result.as_dict()
        CellResult.from_dict(facts)
        write_json(self._path(result.cell), facts | {"setup": self.setup.digest})
        (self.failed / f"{result.cell.training_key}.json").unlink(missing_ok=True)

    def _path(self, cell: Cell) -> Path:
        return self.cells / _file_name(cell)

    def _read(self, cell: Cell) -> CellResult | None:
        path = self._path(cell)
        try:
            text = path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            # NFS: it was replaced while it was read; the next look finds the new one.
            if error.errno != errno.ESTALE:
                warnings.warn(
                    f"the result {path} cannot be read ({error.strerror}); it counts as missing", stacklevel=2
                )
            return None
        try:
            result, digest = _parse(text)
        except _UNFIT as error:
            problem = f"it is damaged ({type(error).__name__}: {str(error)[:200]})"
        else:
            if digest != self.setup.digest:
                problem = "it was made with another setup"
            elif result.cell != cell:
                problem = f"it holds the cell {result.cell.key}"
            else:
                return result
        self._set_aside(path, problem)
        return None

    def _set_aside(self, path: Path, reason: str) -> None:
        message = f"the result {path} is not used, because {reason}; it counts as missing"
        if not self.read_only:
            aside = path.with_name(f"{path.name}.damaged")
            # Another process may have renamed it in the meantime.
            with contextlib.suppress(OSError):
                path.replace(aside)
                message += f" and is kept as {aside.name}"
        warnings.warn(message, stacklevel=2)

    def claim(self, training_key: str) -> Claim | None:
        """Claim a training; return None if a living process has it. Check its results again afterwards."""
        return self.claims.take(training_key)

    def claimed(self) -> set[str]:
        """Return the keys of the trainings that a living process works on."""
        return self.claims.held()

    def clock(self) -> float:
        """Return the file system's time, with which the times of failures are comparable."""
        return self.claims.clock()

    def fail(self, training_key: str, message: str) -> None:
        """Record the failure of a training."""
        write_json(
            self.failed / f"{training_key}.json",
            {"training_key": training_key, "message": message, "time": _now()},
        )

    def failures(self, training_keys: Iterable[str], since: float | None = None) -> dict[str, Failure]:
        """Return the failures of these trainings by key; with `since`, only those after that time."""
        failures = {}
        for key in dict.fromkeys(training_keys):
            path = self.failed / f"{key}.json"
            try:
                text, when = path.read_text(errors="replace"), path.stat().st_mtime
            except OSError:
                continue
            try:
                message = str(json.loads(text)["message"])
            except (ValueError, KeyError, TypeError):
                message = f"it failed, but {path}, which said why, is damaged"
            if since is None or when > since:
                failures[key] = Failure(key, message, when)
        return failures

    def record_launch(self, name: str, facts: Mapping[str, Any]) -> None:
        """Add a command to the manifest.

        Each launch has a file of its own and the manifest is made of all of them, so that no launch is lost when two
        start at the same time.
        """
        folder = make_folder(self.folder / "launches")
        write_json(folder / f"{name}.json", {"time": _now(), **facts})
        launches = []
        for path in sorted(folder.glob("[!.]*.json")):
            with contextlib.suppress(OSError, ValueError):
                launches.append({"launch": path.stem, **json.loads(path.read_text())})
        manifest = {"setup": self.setup.as_dict(), "setup_digest": self.setup.digest, "launches": launches}
        write_json(self.folder / MANIFEST_FILE, manifest)


@cache
def _file_name(cell: Cell) -> str:
    # A key is a hash of the whole cell, and a run looks for thousands of cells after every training.
    return f"{cell.key}.json"


def _parse(text: str) -> tuple[CellResult, str]:
    """Return a result and the digest of its setup; raise one of `_UNFIT` where the text is neither."""
    facts = json.loads(text)
    digest = facts.pop("setup")
    result = CellResult.from_dict(facts)
    # The tables need these as numbers.
    float(result.seconds), int(result.n_test), int(result.n_anomalous)
    return result, digest


def _read_patiently(path: Path) -> Any:
    """Read a JSON file that another process may be about to fill, on a file system without hard links."""
    for _ in range(_PATIENCE):
        with contextlib.suppress(ValueError):
            return json.loads(path.read_text())
        time.sleep(0.1)
    return json.loads(path.read_text())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """Return the differences between two setups, each as one phrase."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = dict.fromkeys([*ours, *theirs])
        return [
            phrase
            for key in names
            for phrase in _differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if theirs == ours else [f"{name or 'setup'} is {theirs!r} there and {ours!r} here"]
