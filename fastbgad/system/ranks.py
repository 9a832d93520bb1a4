"""Ranks of the processes that torchrun or SLURM starts together.

`fastbgad train` makes a group of them, which shares a run (`fastbgad.train.data_parallel`). `fastbgad reproduce` makes
none: its processes share a folder (`fastbgad.experiments.running.ledger`). There, the number of a process only decides
at which category it begins, which GPU it takes and that one of them prints.
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
class Rank:
    """One process of several that were started together."""

    number: int = 0
    world: int = 1
    """Number of processes on all machines."""
    local_rank: int = 0
    """Number of this process among those on its machine."""
    local_world: int = 1
    """Number of processes on this machine."""
    launcher: str = ""
    """torchrun, slurm, or empty for a process that was started alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.world or not 0 <= self.local_rank < self.local_world <= self.world:
            raise ConfigError(
                f"{self.launcher or 'the caller'} says that this is process {self.number} of {self.world}, and "
                f"{self.local_rank} of {self.local_world} on this machine, which cannot be; start the processes again"
            )

    @property
    def is_first(self) -> bool:
        """True for the process that prints."""
        return self.number == 0


def find_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """Read the variables that torchrun, or else SLURM's srun, gives to each process that it starts.

    Raises:
        ConfigError: they are no numbers, or contradict each other.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        world = _number(environment, "WORLD_SIZE")
        local_rank = _number(environment, "LOCAL_RANK", 0)
        local_world = _number(environment, "LOCAL_WORLD_SIZE", local_rank + 1)
        return Rank(_number(environment, "RANK"), world, local_rank, local_world, "torchrun")
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        world = _number(environment, "SLURM_NTASKS")
        local_rank = _number(environment, "SLURM_LOCALID", 0)
        local_world = max(local_rank + 1, min(world, _tasks_here(environment, world)))
        return Rank(_number(environment, "SLURM_PROCID"), world, local_rank, local_world, "slurm")
    return Rank()


def device_of(rank: Rank, name: str) -> torch.device:
    """Return the device of a process. Processes of one machine each take the GPU of their number.

    Where there are fewer GPUs than processes, they share; a device that is named with its number is taken as it is.
    """
    if rank.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        # SLURM may show each process nothing but a GPU of its own, which then has the number 0.
        return torch.device("cuda", rank.local_rank % torch.cuda.device_count())
    return choose_device(name)


def threads_of(rank: Rank, environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the number of CPU threads of a process, None to leave it as it is.

    Processes of one machine divide its cores among them, so that they do not slow each other down.
    """
    if rank.world == 1:
        return None
    # torchrun defaults OMP_NUM_THREADS to 1; any other value was set by the user.
    if environment.get("OMP_NUM_THREADS", "1") != "1":
        return None
    if rank.launcher == "slurm" and environment.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        return max(1, int(environment["SLURM_CPUS_PER_TASK"]))
    return max(1, len(os.sched_getaffinity(0)) // rank.local_world)


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name)
    if text is None and otherwise is not None:
        return otherwise
    if text is None or not text.isdecimal():
        raise ConfigError(f"the environment variable {name} is {text!r}; it is a number where torchrun or SLURM set it")
    return int(text)


def _tasks_here(environment: Mapping[str, str], world: int) -> int:
    """Return the number of tasks on this node. SLURM writes 2(x3),1 for nodes of 2, 2, 2 and 1 tasks."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    counts = [int(tasks) for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(nodes or 1))]
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else world
