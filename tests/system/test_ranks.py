"""Ranks of processes that torchrun or SLURM started: read from their variables, wrong ones named."""

from __future__ import annotations

import os

import pytest
import torch

from fastbgad.errors import ConfigError
from fastbgad.experiments.running.claims import launch_age
from fastbgad.system.ranks import Rank, device_of, find_rank, threads_of

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}


def test_a_process_alone() -> None:
    rank = find_rank({"RANK": "3"})
    assert rank == Rank()
    assert rank.is_first
    assert launch_age(rank) == 0
    assert threads_of(rank, {}) is None


def test_torchrun() -> None:
    rank = find_rank(SLURM | TORCHRUN)
    assert rank == Rank(5, 8, 1, 4, "torchrun")
    assert not rank.is_first
    assert launch_age(rank) > 0


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({"SLURM_TASKS_PER_NODE": "2(x3),1"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2,4", "SLURM_TASKS_PER_NODE": "8"}, 4),
        ({}, 7),
        ({"SLURM_TASKS_PER_NODE": "1"}, 7),
    ],
)
def test_slurm(variables: dict[str, str], tasks: int) -> None:
    assert find_rank(SLURM | variables) == Rank(5, 7, 1, tasks, "slurm")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TORCHRUN | {"RANK": "first"}, "RANK is 'first'"),
        (TORCHRUN | {"RANK": "8"}, "process 8 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "4 of 4 on this machine"),
        (SLURM | {"SLURM_NTASKS": ""}, "SLURM_NTASKS is ''"),
    ],
)
def test_wrong_variables_are_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_rank(variables)


def test_each_process_of_a_machine_takes_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = find_rank(TORCHRUN | {"LOCAL_RANK": "3"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert device_of(rank, "auto") == torch.device("cuda:3")
    assert device_of(rank, "cuda") == torch.device("cuda:3")
    assert device_of(rank, "cuda:1") == torch.device("cuda:1")
    assert device_of(rank, "cpu") == torch.device("cpu")
    assert device_of(Rank(), "auto") == torch.device("cuda")
    # SLURM may show each process one GPU
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert device_of(rank, "auto") == torch.device("cuda:0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_of(rank, "auto") == torch.device("cpu")


def test_processes_share_the_cores_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10)))
    rank = find_rank(TORCHRUN)
    assert threads_of(rank, {}) == 2
    assert threads_of(rank, {"OMP_NUM_THREADS": "1"}) == 2
    assert threads_of(rank, {"OMP_NUM_THREADS": "3"}) is None
    assert threads_of(Rank(0, 16, 0, 16, "torchrun"), {}) == 1
    slurm = find_rank(SLURM | {"SLURM_TASKS_PER_NODE": "2(x4)"})
    assert threads_of(slurm, {}) == 5
    assert threads_of(slurm, {"SLURM_CPUS_PER_TASK": "6"}) == 6
