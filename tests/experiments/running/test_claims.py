"""Claims: one holder at a time, whoever dies, on this machine or another one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from fastbgad.errors import OutputError
from fastbgad.experiments.running.claims import Claims, machine_identity, process_age, process_start

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path / "claims")


def dead_claim(claims: Claims, key: str, number: int = 1) -> Path:
    """A claim of a process of this machine that is gone: the number is this process's, but it started earlier."""
    claims.folder.mkdir(exist_ok=True)
    path = claims.folder / f"{key}.{number}"
    path.write_text(json.dumps({"machine": machine_identity(), "pid": os.getpid(), "started": 1}))
    return path


def in_a_process(body: Callable[[], None]) -> FORK.Process:  # type: ignore[name-defined]
    """Starts a process and waits until it has written to a pipe that it is ready."""
    receive, send = FORK.Pipe(duplex=False)

    def run() -> None:
        body()
        send.send(True)
        time.sleep(60)

    process = FORK.Process(target=run, daemon=True)
    process.start()
    assert receive.poll(30)
    return process


def test_one_holder_at_a_time(claims: Claims) -> None:
    assert claims.held() == set()
    first = claims.take("a-1.5")
    assert first is not None
    assert claims.take("a-1.5") is None
    assert claims.held() == {"a-1.5"}
    other = claims.take("b")
    assert other is not None
    first.release()
    assert claims.held() == {"b"}
    with claims.take("a-1.5") as again:
        assert again is not None
        assert claims.take("a-1.5") is None
    assert claims.held() == {"b"}
    other.release(done=True)
    other.release()
    assert not list(claims.folder.glob("b*"))


def test_a_done_job_leaves_no_claims_of_its_earlier_holders(claims: Claims) -> None:
    dead_claim(claims, "a", 1)
    dead_claim(claims, "a", 2)
    claim = claims.take("a")
    assert claim is not None
    assert sorted(path.name for path in claims.folder.iterdir()) == ["a.1", "a.2", "a.3"]
    claim.release(done=True)
    assert list(claims.folder.iterdir()) == []


def test_an_old_list_of_claims_takes_nothing_from_a_newer_holder(claims: Claims, monkeypatch) -> None:
    """A process that saw the dead first claim, and then slept while others came and went, gets none."""
    dead_claim(claims, "a")
    sleeper = Claims(claims.folder)
    seen = sleeper._numbers()
    second = claims.take("a")
    assert second is not None
    second.release()
    third = claims.take("a")
    assert third is not None
    monkeypatch.setattr(sleeper, "_numbers", lambda: seen)
    assert sleeper.take("a") is None


def race(folder: Path, keys: list[str], start: Barrier, end: Barrier, out: Path) -> None:
    claims = Claims(folder)
    start.wait(30)
    won = [key for key in keys if claims.take(key) is not None]
    end.wait(30)
    out.write_text(json.dumps(won))


def test_processes_race_for_new_and_for_dead_claims(claims: Claims, tmp_path: Path) -> None:
    keys = [f"job{n}" for n in range(40)]
    for key in keys[::2]:
        dead_claim(claims, key)
    start, end = FORK.Barrier(3), FORK.Barrier(3)
    outs = [tmp_path / f"{n}.json" for n in range(3)]
    processes = [FORK.Process(target=race, args=(claims.folder, keys, start, end, out)) for out in outs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    won = [key for out in outs for key in json.loads(out.read_text())]
    assert sorted(won) == sorted(keys)
    # all of them are dead now
    assert claims.held() == set()


def test_the_claim_of_a_killed_process_is_free_at_once(claims: Claims) -> None:
    process = in_a_process(lambda: claims.take("a"))
    assert claims.held() == {"a"}
    assert claims.take("a") is None
    os.kill(process.pid, signal.SIGKILL)
    # Its parent, this test, has not yet asked how it ended: it is still in the table of processes.
    deadline = time.monotonic() + 30
    while claims.held():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert claims.take("a") is not None
    process.join()


def test_a_number_that_another_process_got(claims: Claims) -> None:
    dead_claim(claims, "a")
    assert claims.held() == set()
    assert claims.take("a") is not None


@pytest.mark.parametrize("content", [json.dumps({"machine": "elsewhere", "pid": 1, "started": 1}), "", "{", "[]"])
def test_other_machines_and_unreadable_claims_live_by_their_signs(claims: Claims, content: str) -> None:
    path = dead_claim(claims, "a")
    path.write_text(content)
    assert claims.held() == {"a"}
    assert claims.take("a") is None
    old = claims.clock() - claims.limit - 1
    os.utime(path, (old, old))
    assert claims.held() == set()
    assert claims.take("a") is not None


def test_a_holder_gives_signs_of_life(tmp_path: Path) -> None:
    claims = Claims(tmp_path, heartbeat=0.01)
    claim = claims.take("a")
    assert claim is not None
    path = tmp_path / "a.1"
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 30
    while path.stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    claim.release()
    os.utime(path, (0, 0))
    time.sleep(0.05)
    assert path.stat().st_mtime == 0


def test_a_lost_file_does_not_end_the_job(tmp_path: Path) -> None:
    claims = Claims(tmp_path, heartbeat=0.01)
    claim = claims.take("a")
    assert claim is not None
    (tmp_path / "a.1").unlink()
    time.sleep(0.05)
    claim.release(done=True)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create the folder"):
        Claims(tmp_path / "file").take("a")


def test_processes_are_told_apart() -> None:
    own = process_start(os.getpid())
    assert own is not None
    assert process_start(os.getpid()) == own
    assert process_start(2**22 + 1) is None
    process = in_a_process(lambda: None)
    assert process_start(process.pid) not in (None, own)
    assert 0 <= process_age(process.pid) <= process_age(os.getpid())
    process.kill()
    process.join()
    assert process_start(process.pid) is None
    assert process_age(process.pid) == 0
