"""Two and three processes train what one process trains, and share its files."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastbgad.data import open_category, split_known_anomalies
from fastbgad.errors import ConfigError
from fastbgad.model import BGAD
from fastbgad.progress import Progress
from fastbgad.train import LOG_FILE, MODEL_FILE, STATE_FILE, InterruptedTraining, fit
from fastbgad.train.data_parallel import DataParallel
from tests.models import tiny_config, tiny_model, tiny_split

# Two images of 64 pixels have 512, 128 and 32 patches: with an odd batch, processes hold different numbers of rows.
RUNS = {
    "bgad": tiny_config("bgad"),
    "bgad focal coasting": replace(
        tiny_config("bgad", adam_coasting=True), loss=replace(tiny_config().loss, focal=True)
    ),
    "bgad_dagger": tiny_config("bgad_dagger"),
    "one row now and then": tiny_config("bgad_without", chunk_rows=1, batch_size=1, meta_epochs=1, sub_epochs=1),
}


def trained(name: str, data: Path, parallel: DataParallel | None, **options: object) -> BGAD:
    """One of the runs in float64, where what is left is the order of sums."""
    config = RUNS[name]
    split = split_known_anomalies(open_category(data), 2)
    if name == "one row now and then":
        split = replace(split, normals=split.normals[:1])
    model = tiny_model(config)
    model.flows.double()
    fit(model, split, config, parallel=parallel, **options)  # type: ignore[arg-type]
    return model


def _process(rank: int, world: int, port: int, data: Path, out: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        parallel = DataParallel()
        for name in RUNS:
            if world == 3 and name != "bgad":
                continue
            torch.save(trained(name, data, parallel).state_dict(), out / f"{name} {world} {rank}.pt")
        if world == 2:
            _interrupted_and_resumed(rank, parallel, data, out)
    finally:
        dist.destroy_process_group()


def _interrupted_and_resumed(rank: int, parallel: DataParallel, data: Path, out: Path) -> None:
    """Ctrl-C reaches one process; both stop at the same batch, and both go on."""
    batches = 0

    def interrupt(progress: Progress) -> None:
        nonlocal batches
        batches += progress.stage == "training"
        if rank == 1 and batches == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedTraining):
        trained("bgad", data, parallel, run_dir=out / "run", on_progress=interrupt)
    dist.barrier()
    model = trained("bgad", data, parallel, run_dir=out / "run", resume=True)
    torch.save(model.state_dict(), out / f"resumed 2 {rank}.pt")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_train_what_one_trains(world: int, tmp_path: Path) -> None:
    tiny_split(tmp_path / "data")
    mp.spawn(_process, (world, _free_port(), tmp_path / "data", tmp_path), nprocs=world)
    files = sorted(tmp_path.glob("*.pt"))
    alone = {name: trained(name, tmp_path / "data", None).state_dict() for name in RUNS if world == 2 or name == "bgad"}
    assert len(files) == ((len(RUNS) + 1) * 2 if world == 2 else 3)
    for file in files:
        name = file.name.rsplit(" ", 2)[0].replace("resumed", "bgad")
        found = torch.load(file)
        for tensor, expected in alone[name].items():
            assert torch.allclose(found[tensor].double(), expected.double(), rtol=1e-6, atol=1e-9), (file.name, tensor)
    if world == 2:
        run = tmp_path / "run"
        assert {MODEL_FILE, STATE_FILE, LOG_FILE} <= {path.name for path in run.iterdir()}
        assert len((run / LOG_FILE).read_text().splitlines()) == 4


def test_needs_a_process_group(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        DataParallel()
