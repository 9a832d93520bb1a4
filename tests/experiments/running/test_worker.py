"""Workers: every missing cell once, whoever else works, fails, is interrupted or is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from fastbgad.data import Category
from fastbgad.errors import BackboneError, DataError, FeatureError, InterruptedTraining
from fastbgad.experiments.plan.cells import Cell, CellResult
from fastbgad.experiments.plan.setup import Setup
from fastbgad.experiments.running.claims import Claim
from fastbgad.experiments.running.ledger import Ledger
from fastbgad.experiments.running.worker import Outcome, trainings_of, work
from fastbgad.progress import Progress
from fastbgad.system.ranks import Rank
from tests.cells import FakeRunner, empty_category, result_of, some_cells

FORK = multiprocessing.get_context("fork")
CELLS = some_cells()
OTHER_RANK = Rank(1, 2, 1, 2)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "run", Setup())


class Fakes:
    """Opens categories and makes runners, and keeps both."""

    def __init__(self, run: Callable[[Sequence[Cell]], list[CellResult]] | None = None) -> None:
        self.run, self.runners, self.opened = run, [], []

    def open(self, dataset: str, name: str) -> Category:
        self.opened.append(name)
        return empty_category(dataset, name)

    def make(self, category: Category, dataset: str, on_progress: Callable[[Progress], None]) -> FakeRunner:
        runner = FakeRunner(category.name, self.run)
        runner.on_progress = on_progress
        self.runners.append(runner)
        return runner

    @property
    def asked(self) -> list[tuple[Cell, ...]]:
        return [cells for runner in self.runners for cells in runner.asked]


def run(ledger: Ledger, fakes: Fakes, cells: Sequence[Cell] = CELLS, **options) -> Outcome:
    return work(ledger, cells, fakes.open, fakes.make, poll=0.01, **options)


def process(body: Callable[[], object]) -> FORK.Process:  # type: ignore[name-defined]
    started = FORK.Process(target=body, daemon=True)
    started.start()
    return started


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_cells_are_grouped_by_training() -> None:
    trainings = trainings_of([*CELLS, CELLS[0]])
    # NFAD learns from no anomalies: the two draws share its training, and BGAD's do not.
    assert len(trainings) == 2 * 2 * 3
    assert [len(training.cells) for training in trainings[:3]] == [2, 1, 1]
    assert tuple(cell for training in trainings for cell in training.cells) == CELLS
    assert trainings[0].category == ("mvtec", "carpet")
    assert "carpet · NFAD, seed 0" in trainings[0].title


def test_missing_cells_are_run_category_by_category(ledger: Ledger) -> None:
    there = [CELLS[1], CELLS[2]]
    for cell in there:
        ledger.write(result_of(cell, 0.9))
    fakes, heard = Fakes(), []
    outcome = run(ledger, fakes, on_cells=lambda done, text: heard.append((done, text)))
    assert outcome == Outcome()
    assert fakes.opened == ["carpet", "screw"]
    assert [runner.name for runner in fakes.runners] == ["carpet", "screw"]
    assert all(runner.closed for runner in fakes.runners)
    assert [cell for cells in fakes.asked for cell in cells] == [cell for cell in CELLS if cell not in there]
    assert all(len({cell.training_key for cell in cells}) == 1 for cells in fakes.asked)
    results = ledger.results(CELLS)
    assert [results[cell].last["aupro"] for cell in CELLS[:4]] == [0.5, 0.9, 0.9, 0.5]
    assert len(results) == len(CELLS)
    assert list(ledger.claims.folder.iterdir()) == []
    counts = [done for done, _ in heard]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (2, len(CELLS))
    # nothing is left: no category is even opened
    again = Fakes()
    assert run(ledger, again) == Outcome()
    assert again.opened == []


def test_progress_within_a_training_is_passed_on(ledger: Ledger) -> None:
    heard: list[str] = []

    def show(cells: Sequence[Cell]) -> list[CellResult]:
        fakes.runners[-1].on_progress(Progress("training", 3, 9, 1.0, {}))
        return list(map(result_of, cells))

    fakes = Fakes(show)
    run(ledger, fakes, CELLS[:1], on_cells=lambda done, text: heard.append(text))
    assert "mvtec carpet · NFAD, seed 0 · training 3/9" in heard


def failing_on(bad: Sequence[Cell], error: BaseException) -> Callable[[Sequence[Cell]], list[CellResult]]:
    def run_(cells: Sequence[Cell]) -> list[CellResult]:
        if set(cells) & set(bad):
            raise error
        return list(map(result_of, cells))

    return run_


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FeatureError("training diverged"), "training diverged"),
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
    ],
)
def test_a_failed_training_is_recorded_and_the_rest_goes_on(ledger: Ledger, error: Exception, message: str) -> None:
    fakes = Fakes(failing_on(CELLS[:1], error))
    outcome = run(ledger, fakes)
    assert outcome.failed == {CELLS[0].training_key: message}
    assert ledger.missing(CELLS) == CELLS[:2]
    assert len(fakes.asked) == 12
    assert ledger.claimed() == set()
    # A later command tries again, and forgets the failure when it succeeds.
    again = Fakes()
    assert run(ledger, again) == Outcome()
    assert again.asked == [CELLS[:2]]
    assert ledger.failures([CELLS[0].training_key]) == {}


def test_other_processes_of_a_launch_do_not_retry(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbgad.experiments.running.claims.process_age", lambda pid: 5.0)
    ledger.fail(CELLS[0].training_key, "diverged")
    fakes = Fakes()
    outcome = run(ledger, fakes, rank=OTHER_RANK)
    assert CELLS[:2] not in fakes.asked
    assert outcome.failed == {CELLS[0].training_key: "diverged"}
    assert ledger.missing(CELLS) == CELLS[:2]


def test_a_failure_of_the_last_moment_is_not_retried(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process of the launch fails at the training after this one has looked, and before it has the claim."""
    take = ledger.claim

    def claim(key: str) -> Claim | None:
        if key == CELLS[0].training_key:
            ledger.fail(key, "diverged")
        return take(key)

    monkeypatch.setattr("fastbgad.experiments.running.claims.process_age", lambda pid: 5.0)
    monkeypatch.setattr(ledger, "claim", claim)
    fakes = Fakes()
    assert run(ledger, fakes, rank=OTHER_RANK).failed == {CELLS[0].training_key: "diverged"}
    assert CELLS[:2] not in fakes.asked


def test_a_bug_is_not_hidden(ledger: Ledger) -> None:
    fakes = Fakes(failing_on(CELLS, ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        run(ledger, fakes)
    assert fakes.runners[0].closed
    assert ledger.claimed() == set()


def test_a_runner_that_gives_too_little_is_a_failure(ledger: Ledger) -> None:
    outcome = run(ledger, Fakes(lambda cells: [result_of(cells[0])]))
    assert {key: "no result came of" in text for key, text in outcome.failed.items()} == {
        training.key: True for training in trainings_of(CELLS) if len(training.cells) == 2
    }
    assert len(ledger.results(CELLS)) == 12


def test_a_category_that_cannot_be_opened_is_named_once(ledger: Ledger) -> None:
    fakes = Fakes()

    def open_(dataset: str, name: str) -> Category:
        fakes.opened.append(name)
        if name == "carpet":
            raise DataError("the category carpet was not found")
        return empty_category(dataset, name)

    outcome = work(ledger, CELLS, open_, fakes.make)
    assert outcome.unopened == {("mvtec", "carpet"): "the category carpet was not found"}
    assert outcome.failed == {}
    assert fakes.opened == ["carpet", "screw"]
    assert {cell.category for cell in ledger.missing(CELLS)} == {"carpet"}
    assert len(ledger.missing(CELLS)) == len(CELLS) // 2


def test_a_runner_that_cannot_be_made_fails_its_category(ledger: Ledger) -> None:
    made = []

    def make(category: Category, dataset: str, on_progress: object) -> FakeRunner:
        made.append(category.name)
        if category.name == "screw":
            raise BackboneError("no weights")
        return FakeRunner(category.name)

    outcome = work(ledger, CELLS, Fakes().open, make)
    assert made == ["carpet", "screw"]
    assert set(outcome.failed.values()) == {"no weights"}
    assert {cell.category for cell in ledger.missing(CELLS)} == {"screw"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InterruptedTraining("stopped")])
def test_an_interruption_keeps_results_and_gives_claims_back(ledger: Ledger, error: BaseException) -> None:
    fakes = Fakes(failing_on(CELLS[3:4], error))
    with pytest.raises(InterruptedTraining, match="3 of 16 cells") as stop:
        run(ledger, fakes)
    assert str(ledger.folder) in str(stop.value)
    assert fakes.runners[0].closed
    assert set(ledger.results(CELLS)) == set(CELLS[:3])
    assert ledger.claimed() == set()
    assert ledger.failures(cell.training_key for cell in CELLS) == {}
    again = Fakes()
    run(ledger, again)
    assert [cell for cells in again.asked for cell in cells] == list(CELLS[3:])


def test_sigterm_is_an_interruption(ledger: Ledger) -> None:
    def terminate(cells: Sequence[Cell]) -> list[CellResult]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return []

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedTraining):
        run(ledger, Fakes(terminate))
    assert signal.getsignal(signal.SIGTERM) is before
    assert ledger.claimed() == set()


def test_a_damaged_result_is_run_again(ledger: Ledger) -> None:
    run(ledger, Fakes())
    (ledger.cells / f"{CELLS[4].key}.json").write_text("{")
    fakes = Fakes()
    with pytest.warns(UserWarning, match="damaged"):
        run(ledger, fakes)
    assert fakes.asked == [(CELLS[4],)]
    assert len(ledger.results(CELLS)) == len(CELLS)


def test_processes_begin_at_different_categories(ledger: Ledger) -> None:
    cells = some_cells(("carpet", "grid", "screw", "tile"), seeds=1)
    fakes = Fakes()
    run(ledger, fakes, cells, rank=OTHER_RANK)
    assert fakes.opened == ["screw", "tile", "carpet", "grid"]


def test_a_category_that_nobody_works_on_comes_first(ledger: Ledger) -> None:
    claim = ledger.claim(CELLS[0].training_key)
    assert claim is not None
    fakes, left = Fakes(), []

    def release_at_the_end(done: int, text: str) -> None:
        if text.startswith("waiting"):
            left.append(ledger.missing(CELLS))
            claim.release()

    run(ledger, fakes, on_cells=release_at_the_end)
    # It then helps with what is left of the other one, and takes what is given back.
    assert fakes.opened == ["screw", "carpet", "carpet"]
    assert left == [CELLS[:2]]
    assert ledger.missing(CELLS) == ()


def test_a_process_waits_for_the_others(ledger: Ledger) -> None:
    def hold() -> None:
        claim = ledger.claim(CELLS[0].training_key)
        assert claim is not None
        wait_for(lambda: len(ledger.missing(CELLS)) == 2)
        for cell in CELLS[:2]:
            ledger.write(result_of(cell, 0.25))
        claim.release(done=True)

    holder = process(hold)
    wait_for(ledger.claimed)
    fakes, heard = Fakes(), []
    run(ledger, fakes, on_cells=lambda done, text: heard.append(text))
    assert CELLS[:2] not in fakes.asked
    assert ledger.results(CELLS[:1])[CELLS[0]].last["aupro"] == 0.25
    assert ledger.missing(CELLS) == ()
    assert "waiting for 2 cells of other processes" in heard
    holder.join()


def test_the_work_of_a_killed_process_is_taken_over(ledger: Ledger) -> None:
    """It is killed in the middle of a training, after it has finished one."""

    def stuck(cells: Sequence[Cell]) -> list[CellResult]:
        if CELLS[2] in cells:
            time.sleep(60)
        return list(map(result_of, cells))

    victim = process(lambda: run(ledger, Fakes(stuck), rank=OTHER_RANK, cells=CELLS[:8]))
    wait_for(lambda: CELLS[2].training_key in ledger.claimed())
    fakes, deadline = Fakes(), time.monotonic() + 30

    def kill_at_the_end(done: int, text: str) -> None:
        if text.startswith("waiting"):
            os.kill(victim.pid, signal.SIGKILL)
            assert time.monotonic() < deadline

    run(ledger, fakes, on_cells=kill_at_the_end)
    assert fakes.asked[-1] == (CELLS[2],)
    assert CELLS[:2] not in fakes.asked
    assert len(ledger.results(CELLS)) == len(CELLS)
    assert ledger.claimed() == set()
    victim.join()


def test_processes_share_the_work_without_doing_any_twice(ledger: Ledger, tmp_path: Path) -> None:
    cells = some_cells(("carpet", "grid", "screw"), seeds=3)

    def worker(rank: int) -> None:
        def note(asked: Sequence[Cell]) -> list[CellResult]:
            with (tmp_path / f"{rank}.txt").open("a") as file:
                file.writelines(f"{cell.key}\n" for cell in asked)
            time.sleep(0.005)
            return list(map(result_of, asked))

        run(ledger, Fakes(note), cells, rank=Rank(rank, 3, rank, 3))

    workers = [process(lambda rank=rank: worker(rank)) for rank in range(3)]
    for each in workers:
        each.join(60)
        assert each.exitcode == 0
    ran = [path.read_text().split() for path in tmp_path.glob("*.txt")]
    assert sorted(key for keys in ran for key in keys) == sorted(cell.key for cell in cells)
    assert len(ran) > 1
    assert ledger.missing(cells) == ()
