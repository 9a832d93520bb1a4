"""The command line: `fastbgad demo | check | train | evaluate | predict | bench | convert | export | reproduce | info`.

Every command is a frozen dataclass with a method `run`. tyro turns its fields into options and their docstrings into
help.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from .bench import Bench
from .check import CheckData
from .convert import Convert
from .demo import Demo
from .evaluate import Evaluate
from .export import Export
from .info import Info
from .options import preset_of, renamed_options
from .predict import Predict
from .reproduce import Reproduce, reproduce_defaults
from .train import Train, train_defaults

Command = Demo | CheckData | Train | Evaluate | Predict | Bench | Convert | Export | Reproduce | Info


def parse(arguments: Sequence[str]) -> Command:
    """Return the command that the arguments ask for.

    Raises:
        SystemExit: help was asked for, or the arguments are wrong; both are printed here.
    """
    arguments = renamed_options(arguments)
    preset = preset_of(arguments)
    commands = (
        Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[CheckData, tyro.conf.subcommand("check")]
        | Annotated[Train, tyro.conf.subcommand("train", default=train_defaults(preset))]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
        | Annotated[Convert, tyro.conf.subcommand("convert")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Reproduce, tyro.conf.subcommand("reproduce", default=reproduce_defaults(preset))]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    command: Any = tyro.cli(
        commands,
        prog="fastbgad",
        description="Boundary-guided anomaly detection (BGAD, CVPR 2023), fast and checked.",
        args=list(arguments),
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    return command
