"""Which of several processes this one is, when torchrun or SLURM starts them.

`fastbgad train` makes a group of them, which shares a run (`fastbgad.train.data_parallel`). `fastbgad reproduce` makes
none: its processes share a folder (`fastbgad.experiments.running.ledger`), and the number of a process only decides
where it begins, which GPU it takes and that one of them prints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .environment import choose_device


@dataclass(frozen=True)
class Place:
    """The place of this process among those that were started together."""

    rank: int = 0
    world: int = 1
    """How many there are on all machines."""
    local_rank: int = 0
    local_world: int = 1
    """How many there are on this machine."""
    launcher: str = ""
    """torchrun, slurm, or empty for a process that was started alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world or not 0 <= self.local_rank < self.local_world <= self.world:
            raise ConfigError(
                f"{self.launcher or 'the caller'} says that this is process {self.rank} of {self.world}, and "
                f"{self.local_rank} of {self.local_world} on this machine, which cannot be; start the processes anew"
            )

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints."""
        return self.rank == 0


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Reads the variables that torchrun, or else SLURM's srun, gives to each process that it starts.

    Raises:
        ConfigError: they are no numbers, or contradict each other.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        world = _number(environment, "WORLD_SIZE")
        local_rank = _number(environment, "LOCAL_RANK", 0)
        local_world = _number(environment, "LOCAL_WORLD_SIZE", local_rank + 1)
        return Place(_number(environment, "RANK"), world, local_rank, local_world, "torchrun")
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        world = _number(environment, "SLURM_NTASKS")
        local_rank = _number(environment, "SLURM_LOCALID", 0)
        local_world = max(local_rank + 1, min(world, _tasks_here(environment, world)))
        return Place(_number(environment, "SLURM_PROCID"), world, local_rank, local_world, "slurm")
    return Place()


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name)
    if text is None and otherwise is not None:
        return otherwise
    if text is None or not text.isdecimal():
        raise ConfigError(f"the environment variable {name} is {text!r}; it is a number where torchrun or SLURM set it")
    return int(text)


def _tasks_here(environment: Mapping[str, str], world: int) -> int:
    """How many tasks SLURM started on this node: it writes 2(x3),1 for nodes of 2, 2, 2 and 1 tasks."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    counts = [int(tasks) for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(nodes or 1))]
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else world


def device_of(place: Place, name: str) -> torch.device:
    """The device of a process: with several GPUs on a machine, each of its processes takes the one of its number.

    Where there are fewer GPUs than processes, they share; a device that is named with its number is taken as it is.
    """
    if place.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        # SLURM may show each process nothing but a GPU of its own, which then has the number 0.
        return torch.device("cuda", place.local_rank % torch.cuda.device_count())
    return choose_device(name)


def threads_of(place: Place, environment: Mapping[str, str] = os.environ) -> int | None:
    """CPU threads for a process, so that those on one machine do not take each other's cores; None: as they are."""
    if place.world == 1:
        return None
    # torchrun sets 1, the slowest choice, where nothing is set; anything else was somebody's wish.
    if environment.get("OMP_NUM_THREADS", "1") != "1":
        return None
    if place.launcher == "slurm" and environment.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        return max(1, int(environment["SLURM_CPUS_PER_TASK"]))
    return max(1, len(os.sched_getaffinity(0)) // place.local_world)
