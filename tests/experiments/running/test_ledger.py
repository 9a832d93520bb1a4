"""The ledger: results whole or not there, whatever happens to files and processes; one setup per folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread

import pytest

from fastbgad.config import LossConfig, TrainConfig
from fastbgad.errors import ConfigError
from fastbgad.experiments.plan.setup import Setup
from fastbgad.experiments.running.ledger import Ledger
from tests.cells import result_of, some_cells

FORK = multiprocessing.get_context("fork")
CELLS = some_cells()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "run", Setup())


def test_results_come_back(ledger: Ledger) -> None:
    assert ledger.results(CELLS) == {}
    assert ledger.missing(CELLS) == CELLS
    for cell in CELLS[1:3]:
        ledger.write(result_of(cell))
    found = ledger.results(reversed(CELLS))
    assert list(found) == [CELLS[2], CELLS[1]]
    assert found[CELLS[1]] == result_of(CELLS[1])
    assert ledger.missing(CELLS) == (CELLS[0], *CELLS[3:])
    assert Ledger(ledger.folder, Setup()).results(CELLS) == found
    assert {result.cell for result in ledger.everything()} == set(CELLS[1:3])


def test_a_result_counts_once(ledger: Ledger) -> None:
    ledger.write(result_of(CELLS[0], 0.4))
    ledger.write(result_of(CELLS[0], 0.6))
    assert ledger.results([*CELLS, CELLS[0]]) == {CELLS[0]: result_of(CELLS[0], 0.6)}
    assert [path.name for path in ledger.cells.iterdir()] == [f"{CELLS[0].key}.json"]


def test_a_result_that_could_not_be_read_again_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        ledger.write(result_of(CELLS[0], float("nan")))
    assert ledger.missing(CELLS[:1]) == CELLS[:1]


def good_text(ledger: Ledger) -> str:
    return json.dumps(result_of(CELLS[0]).as_dict() | {"setup": ledger.setup.digest})


def changed(ledger: Ledger, **values: object) -> str:
    return json.dumps(json.loads(good_text(ledger)) | values)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text, ledger: text[: len(text) // 2], "damaged"),
        (lambda text, ledger: "", "damaged"),
        (lambda text, ledger: "\x00" * 300, "damaged"),
        (lambda text, ledger: "[]", "damaged"),
        (lambda text, ledger: "{}", "damaged"),
        (lambda text, ledger: changed(ledger, last={"image_auroc": 0.5}), "damaged"),
        (lambda text, ledger: text.replace("0.5", "NaN"), "damaged"),
        (lambda text, ledger: text.replace("0.5", "1.5"), "damaged"),
        (lambda text, ledger: text.replace("0.5", '"0.5"'), "damaged"),
        (lambda text, ledger: changed(ledger, seconds="long"), "damaged"),
        (lambda text, ledger: changed(ledger, more=1), "damaged"),
        (lambda text, ledger: changed(ledger, cell=CELLS[1].as_dict()), CELLS[1].key),
        (lambda text, ledger: changed(ledger, setup="another"), "another setup"),
    ],
)
def test_an_unfit_entry_is_named_and_set_aside(ledger: Ledger, spoil, reason: str) -> None:
    path = ledger.cells / f"{CELLS[0].key}.json"
    path.write_text(good_text(ledger))
    assert set(ledger.results(CELLS)) == {CELLS[0]}
    path.write_text(spoil(good_text(ledger), ledger))
    with pytest.warns(UserWarning, match=reason) as caught:
        assert Ledger(ledger.folder, Setup(), read_only=True).results(CELLS) == {}
    assert str(path) in str(caught[0].message)
    assert path.exists()
    with pytest.warns(UserWarning, match="damaged"):
        assert ledger.results(CELLS) == {}
    assert [entry.name for entry in ledger.cells.iterdir()] == [f"{path.name}.damaged"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ledger.results(CELLS) == {}
        assert ledger.missing(CELLS) == CELLS
        assert ledger.everything() == []


def test_a_folder_in_place_of_a_result_counts_as_missing(ledger: Ledger) -> None:
    (ledger.cells / f"{CELLS[0].key}.json").mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert ledger.results(CELLS) == {}


def test_another_setup_is_refused_with_what_differs(ledger: Ledger) -> None:
    other = Setup(image_size=(64, 64), training=TrainConfig(loss=LossConfig(beta=0.05)))
    for read_only in (False, True):
        with pytest.raises(ConfigError) as error:
            Ledger(ledger.folder, other, read_only=read_only)
        message = str(error.value)
        assert "image_size is [256, 256] there and [64, 64] here" in message
        assert "training.loss.beta is 0.01 there and 0.05 here" in message
        assert "--out" in message
        assert "backbone" not in message
    assert Ledger(ledger.folder, Setup()).setup == Setup()


def test_a_damaged_setup_is_named(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbgad.experiments.running.ledger._PATIENCE", 1)
    path = ledger.folder / "setup.json"
    path.write_text('{"backbone"')
    with pytest.raises(ConfigError, match="remove it and repeat") as error:
        Ledger(ledger.folder, Setup())
    assert str(path) in str(error.value)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="another setup"):
        Ledger(ledger.folder, Setup())


def test_one_of_two_setups_wins_a_new_folder(tmp_path: Path) -> None:
    setups = [Setup(pro_limit=share / 10) for share in range(1, 9)]
    opened, start = [], Barrier(len(setups))

    def open_(setup: Setup) -> None:
        start.wait(30)
        try:
            opened.append(Ledger(tmp_path / "run", setup).setup)
        except ConfigError:
            opened.append(None)

    threads = [Thread(target=open_, args=(setup,)) for setup in setups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [setup for setup in opened if setup is not None]
    assert len(opened) == len(setups)
    assert len(winners) == 1
    assert Ledger(tmp_path / "run", winners[0])


def test_looking_makes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run", Setup(), read_only=True)
    assert ledger.results(CELLS) == {}
    assert ledger.missing(CELLS) == CELLS
    assert ledger.everything() == []
    assert ledger.claimed() == set()
    assert ledger.failures([CELLS[0].training_key]) == {}
    assert not (tmp_path / "run").exists()


def test_failures_are_kept_until_the_training_is_done(ledger: Ledger) -> None:
    keys = [cell.training_key for cell in CELLS]
    before = ledger.clock() - 1
    ledger.fail(keys[0], "no such file: carpet/000.png")
    ledger.fail(keys[-1], "diverged")
    found = ledger.failures(keys, before)
    assert {key: failure.message for key, failure in found.items()} == {
        keys[0]: "no such file: carpet/000.png",
        keys[-1]: "diverged",
    }
    assert ledger.failures(keys, ledger.clock() + 1) == {}
    assert set(ledger.failures(keys)) == {keys[0], keys[-1]}
    ledger.write(result_of(CELLS[0]))
    assert set(ledger.failures(keys)) == {keys[-1]}
    (ledger.failed / f"{keys[-1]}.json").write_text("{")
    assert "damaged" in ledger.failures(keys)[keys[-1]].message


def test_the_manifest_lists_every_launch(ledger: Ledger) -> None:
    ledger.record_launch("first", {"tables": ["btad"]})
    Ledger(ledger.folder, Setup()).record_launch("second", {"tables": ["one_class"]})
    (ledger.folder / "launches" / "third.json").write_text("{")
    ledger.record_launch("first", {"tables": ["btad", "beta"]})
    manifest = json.loads((ledger.folder / "manifest.json").read_text())
    assert manifest["setup"] == Setup().as_dict()
    assert [(launch["launch"], launch["tables"]) for launch in manifest["launches"]] == [
        ("first", ["btad", "beta"]),
        ("second", ["one_class"]),
    ]


def test_a_writer_killed_at_any_moment_leaves_whole_results(ledger: Ledger) -> None:
    def write_for_ever() -> None:
        for round_ in range(10**6):
            for cell in CELLS:
                result = result_of(cell, (round_ % 10) / 10)
                # long enough that a write takes a moment
                ledger.write(replace(result, facts={"filler": "x" * 10**5}))

    for _ in range(3):
        process = FORK.Process(target=write_for_ever)
        process.start()
        deadline = time.monotonic() + 30
        while len(ledger.missing(CELLS)) > len(CELLS) // 2:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert set(ledger.results(CELLS)) == set(CELLS) - set(ledger.missing(CELLS))
        for path in ledger.cells.glob("[!.]*"):
            path.unlink()
