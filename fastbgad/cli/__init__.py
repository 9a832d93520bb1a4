"""The command line: one file per command, with its options and its `run`."""

from __future__ import annotations

from ..errors import MissingDependencyError

try:
    import tyro  # noqa: F401
except ImportError as error:
    raise MissingDependencyError("tyro", "report", "the command line") from error
