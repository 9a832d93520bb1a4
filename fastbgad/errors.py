"""The errors a user can meet.

Every one derives from `FastBGADError`, names the file or the value that is wrong and says what to do about it.
The command line prints the message alone and exits with code 2; a traceback means a bug in fastbgad.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, get_args

from .wording import bullets, choose, count


class FastBGADError(Exception):
    """Base of all errors that come from the input, the configuration or the machine, not from a bug."""


class ConfigError(FastBGADError):
    """An option has a value that cannot work (a negative size, an unknown method, ...)."""


class DataError(FastBGADError):
    """An image, a mask or a dataset cannot be used."""


class DatasetProblemsError(DataError):
    """Dataset validation failed. `problems` lists every issue found, the message the first `shown` of them.

    Attributes:
        problems: one sentence per problem, each naming its file or folder.
    """

    shown = 20

    def __init__(self, root: object, problems: Sequence[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        head = f"{count(len(self.problems), 'problem')} in the dataset {root}"
        super().__init__(f"{head}:\n{bullets(self.problems, self.shown)}")


class FeatureError(FastBGADError):
    """Features or scores contain NaN or Inf, or do not have the shape the model was made for."""


class CheckpointError(FastBGADError):
    """A checkpoint is missing, damaged, or belongs to another architecture."""


class BackboneError(FastBGADError):
    """A backbone or its weights are not available."""


class MetricError(FastBGADError):
    """A metric is not defined for this input (one class only, NaN scores, maps and masks of different sizes)."""


class OutputError(FastBGADError):
    """A file or folder cannot be written."""


class BackendError(FastBGADError):
    """The requested implementation (`impl=...`) cannot run these tensors on this machine."""


class UnsupportedFlowError(FastBGADError):
    """A flow of another package computes something that fastbgad's coupling layers do not; it was left as it was."""


class InterruptedTraining(FastBGADError):
    """Training stopped on request; its state is saved, and the message says how to continue."""


class MissingDependencyError(FastBGADError):
    """An optional package is not installed; the message says which extra brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'fastbgad[{extra}]'")


class Notice(UserWarning):
    """A choice made by fastbgad that the user may want to know of; nothing is wrong.

    The command line prints it as a line that begins with "note". `warnings.filterwarnings("ignore", category=Notice)`
    silences it.
    """


def check_choice(
    name: str, value: object, choices: Collection[str] | Any, error: type[FastBGADError] = ConfigError
) -> None:
    """Raise an error unless an option has one of the values that it can have.

    Args:
        name: of the option, as the user writes it.
        value: what was given.
        choices: the values, or a `Literal` of them.
        error: the class of the error.
    """
    known = get_args(choices) or choices
    if value not in known:
        raise error(f"{name} is {value!r}; {choose(known)}")
