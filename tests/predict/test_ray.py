"""Bulk prediction by Ray: the local engine's numbers, whoever dies on the way, and nothing computed twice."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbgad.__main__ import main
from fastbgad.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    FeatureError,
    MissingDependencyError,
    Notice,
    OutputError,
)
from fastbgad.model import BGAD
from fastbgad.predict.image_list import read_part
from fastbgad.predict.local import COLUMNS, CSV_FILE, find_images, map_names, predict_files
from fastbgad.predict.ray import ATTEMPTS, ShardScorer, open_ray_run, predict_with_ray
from fastbgad.predict.ray_session import ray_session
from fastbgad.predict.shards import ShardedRun, open_run
from fastbgad.train.fit import fit
from tests.make_data import save
from tests.models import tiny_config, tiny_model, tiny_split

ray = pytest.importorskip("ray", reason="the extra ray is not installed")

IMAGES, SHARD = 11, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    config = tiny_config("nfad")
    model = tiny_model(config)
    fit(model, tiny_split(root / "data"), config)
    model.save(root / "model.safetensors")
    return root / "model.safetensors"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for number in range(IMAGES):
        save(folder / f"{number:02d}.png", rng.integers(0, 255, (64 + number, 64, 3), dtype=np.uint8))
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all tests: it takes seconds to start."""
    with ray_session():
        yield


def rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def stamps(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}


# ------------------------------------------------------------- with workers


def test_the_numbers_of_the_local_engine_and_resume(
    cluster: None, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, broken = tmp_path / "out", photos / "04.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    command = ["predict", str(photos), "--engine", "ray", "--model", str(model), "--out", str(out), "--maps", "npy"]
    command += ["--shard-size", str(SHARD), "--batch-size", "2", "--device", "cpu"]
    assert main([*command, "--ray-workers", "2"]) == 2
    told = capsys.readouterr().out
    assert "scored 10 images: " in told
    assert "04.png is damaged" in told
    predict_files(BGAD.load(model), find_images([photos]), tmp_path / "local", maps="npy", batch_size=2)
    ours, local = rows(out / CSV_FILE), rows(tmp_path / "local" / CSV_FILE)
    for row, expected in zip(ours, local, strict=True):
        map_ours, map_local = row.pop("map"), expected.pop("map")
        assert row == expected  # to the last digit, and in the same order
        if not row["error"]:
            assert np.array_equal(np.load(out / map_ours), np.load(tmp_path / "local" / map_local))
    assert [row["error"] != "" for row in ours] == [number == 4 for number in range(IMAGES)]

    # One shard is lost, one half written, a worker's temporary file is left; the broken image has been repaired.
    before = stamps(out)
    assert sorted(before) == ["000000.csv", "000001.csv", "000002.csv", "000003.csv"]
    (out / "shards" / "000003.csv").unlink()
    half = out / "shards" / "000002.csv"
    half.write_bytes(half.read_bytes()[:-30])
    (out / "shards" / ".000000.x1y2.csv").write_text("half")
    broken.write_bytes(whole)
    assert main([*command, "--resume", "--ray-workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "11 images, 6 to score in 3 of 4 shards" in told  # 04.png, shard 2 of 3 images, shard 3 of 2
    assert "scored 6 images, 5 were there already" in told
    after = stamps(out)
    assert [name for name in sorted(before) if after.pop(name) == before[name]] == ["000000.csv"]
    assert not after
    again = rows(out / CSV_FILE)
    assert [row["image"] for row in again] == [str(photos / f"{number:02d}.png") for number in range(IMAGES)]
    for row, old in zip(again, ours, strict=True):
        assert row["error"] == ""
        assert (out / row["map"]).is_file()
        if not old["error"]:
            assert {name: row[name] for name in old} == old

    # All is there: no worker is started, and the CSV is made of the shards again.
    joined = (out / CSV_FILE).read_bytes()
    (out / CSV_FILE).unlink()
    assert main([*command, "--resume"]) == 0
    assert (out / CSV_FILE).read_bytes() == joined
    assert stamps(out).keys() == before.keys()


def test_a_worker_is_killed_and_a_shard_is_given_up(cluster: None, model: Path, photos: Path, tmp_path: Path) -> None:
    """An image that is a pipe holds its reader until it is killed; another shard has killed its workers before."""
    out, slow = tmp_path / "out", photos / "04.png"
    ray_run = open_ray_run(model, [photos], out, maps="none", shard_size=SHARD)
    attempts = out / "attempts"
    attempts.mkdir()
    (attempts / "000002").write_text("host 1\n" * ATTEMPTS)
    slow.rename(tmp_path / "kept.png")
    os.mkfifo(slow)
    killed: list[int] = []

    def kill() -> None:
        while not (attempts / "000001").exists() or not (attempts / "000001").read_text().endswith("\n"):
            time.sleep(0.01)
        process = int((attempts / "000001").read_text().split()[1])
        os.kill(process, signal.SIGKILL)
        slow.unlink()
        shutil.copy(tmp_path / "kept.png", slow)
        killed.append(process)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    counts: list[int] = []
    with pytest.raises(BackendError, match=rf"1 shard crashed {ATTEMPTS} workers.*\n.*shard 2: .*06\.png to .*08\.png"):
        predict_with_ray(ray_run, device="cpu", ray_workers=1, on_images=counts.append)
    killer.join()
    assert len(killed) == 1
    assert sorted(counts) == [2, SHARD, SHARD]  # the killed worker's shard counts once
    assert sorted(stamps(out)) == ["000000.csv", "000001.csv", "000003.csv"]
    assert not (out / CSV_FILE).exists()
    before = stamps(out)
    summary = predict_with_ray(
        open_ray_run(model, [photos], out, maps="none", shard_size=SHARD, resume=True), device="cpu"
    )
    assert (summary.scored, summary.skipped, summary.failed) == (SHARD, IMAGES - SHARD, 0)
    assert stamps(out) | before == stamps(out)
    assert [row["image"] for row in rows(out / CSV_FILE)] == [str(path) for path in find_images([photos])]


def test_an_error_of_a_worker_arrives_as_itself(cluster: None, model: Path, photos: Path, tmp_path: Path) -> None:
    own = tmp_path / "model.safetensors"
    shutil.copy(model, own)
    ray_run = open_ray_run(own, [photos], tmp_path / "out", maps="none", shard_size=SHARD)
    tiny_changed = BGAD.load(own)
    tiny_changed.offset += 1
    tiny_changed.save(own)
    with pytest.raises(CheckpointError, match="another model than the run began with"):
        predict_with_ray(ray_run, device="cpu", ray_workers=1)
    assert not stamps(tmp_path / "out")
    with pytest.raises(ConfigError, match="--device cpu"):
        predict_with_ray(ray_run, device="cuda", gpus_per_worker=1000)


# ------------------------------------------------------------- without them


def opened(photos: Path, out: Path, *, finish: bool = True, **options: Any) -> ShardedRun:
    """A run folder whose shards are finished, with invented scores."""
    run = open_run(
        [photos], out, **{"model_sha256": "m", "maps": "none", "shard_size": SHARD, "resume": False, **options}
    )
    for shard in run.waiting if finish else ():
        names = read_part(out / "images.list", shard.part)
        run.folder.write(shard.part, [[str(name), "0.5", "normal", "0", "", ""] for name in names])
    return run


def test_a_folder_belongs_to_one_model_and_one_list(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    opened(photos, out, finish=False)
    opened(photos, out)  # of the first nothing had come
    assert opened(photos, out, resume=True).waiting == ()
    for options, message in (
        ({}, "--resume"),
        ({"model_sha256": "n", "resume": True}, "another model"),
        ({"shard_size": 4, "resume": True}, "take --shard-size 3"),
        ({"maps": "npy", "resume": True}, "take --maps none"),
        ({"bit_depth": 12, "resume": True}, "begun without --bit-depth"),
    ):
        with pytest.raises(OutputError, match=message):
            opened(photos, out, **options)
    shutil.copy(photos / "00.png", photos / "99.png")
    with pytest.raises(OutputError, match=r"another list of images \(11 then, 12 now\)"):
        opened(photos, out, resume=True)
    assert sorted(path.name for path in out.iterdir()) == ["images.list", "manifest.json", "shards"]
    (photos / "99.png").unlink()
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["bit_depth"]  # as in runs before there was a choice
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert opened(photos, out, resume=True).waiting == ()
    (out / "manifest.json").write_text("{")
    with pytest.raises(OutputError, match=r"manifest\.json is damaged"):
        opened(photos, out, resume=True)
    (out / "manifest.json").unlink()
    with pytest.raises(OutputError, match="do not come from --engine ray"):
        opened(photos, out, resume=True)
    with pytest.raises(ConfigError, match="at least 1"):
        opened(photos, tmp_path / "new", shard_size=0)


def test_bit_depth(model: Path, tmp_path: Path) -> None:
    """A worker takes the depth that the model was trained with, or the one that is asked for."""
    values = np.random.default_rng(0).integers(0, 4096, (64, 64), dtype=np.uint16)
    photo = save(tmp_path / "a.png", values)
    trained = BGAD.load(model)
    trained.history["bit_depth"] = 12
    trained.save(tmp_path / "twelve.safetensors")
    scores = {}
    for name, options in (
        ("trained", {"model": tmp_path / "twelve.safetensors"}),
        ("asked", {"model": model, "bit_depth": 12}),
        ("unknown", {"model": model}),
        ("all asked", {"model": tmp_path / "twelve.safetensors", "bit_depth": 16}),
    ):
        ray_run = open_ray_run(**options, patterns=[photo], out=tmp_path / name, maps="none")
        ((_, scores[name], *_, error),) = ShardScorer(ray_run.job, "cpu").score(ray_run.run.parts[0])
        assert ("give --bit-depth 12" in error) == (name == "unknown")
    assert scores["trained"] == scores["asked"] != scores["all asked"]


@pytest.mark.parametrize(("inside", "left_out"), [("scores", "scores"), (".", "maps, shards")])
def test_the_results_among_the_images(photos: Path, inside: str, left_out: str) -> None:
    """They are no images of the run that is resumed, whose list is the same, then."""
    out = photos / inside
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # of the empty folder
        run = opened(photos, out, maps="overlay")
    for number in range(2):
        save(out / "maps" / f"{number:06d}" / "a.png", np.zeros((8, 8), np.uint8))
    run.folder.join(run.parts)
    with pytest.warns(Notice, match=rf"left out of .*photos: . folders? that results .*\({left_out}\)$") as told:
        again = opened(photos, out, maps="overlay", resume=True)
    assert len(told) == 1
    assert (again.count, again.waiting) == (IMAGES, ())


def test_only_whole_shards_of_the_right_images_count(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = opened(photos, out)
    first, second, third, last = (out / "shards" / f"{number:06d}.csv" for number in range(4))
    content = second.read_bytes()
    first.write_bytes(third.read_bytes())  # whole, but of other images
    second.write_bytes(content[:-4])  # cut within the last line
    third.write_bytes(third.read_bytes()[:-1])  # cut where a message could have gone on
    last.write_bytes(b"")
    with pytest.raises(OutputError, match=r"000000\.csv is missing or damaged"):
        run.folder.join(run.parts)
    assert not (out / CSV_FILE).exists()
    again = opened(photos, out, resume=True)
    assert [shard.part.number for shard in again.waiting] == [0, 1, 2, 3]
    assert again.waiting_images == IMAGES


def test_maps_of_different_images_have_different_names() -> None:
    images = [Path(name) for name in ("x/a.png", "x/a.jpg", "y/a.png", "b.png", "x_a.png", f"{'l' * 240}.png")]
    names = map_names(images)
    assert len(set(names.values())) == len(images)
    assert (names[images[2]], names[images[3]]) == ("y_a", "b")
    assert max(map(len, names.values())) < 100


def test_bad_input_is_found_before_ray_starts(model: Path, photos: Path, tmp_path: Path) -> None:
    uncalibrated = tmp_path / "uncalibrated.safetensors"
    tiny_model(tiny_config("nfad")).save(uncalibrated, allow_uncalibrated=True)
    out = tmp_path / "out"
    for error, message, options in (
        (CheckpointError, "no checkpoint", {"model": tmp_path / "none.safetensors"}),
        (FeatureError, "no calibration", {"model": uncalibrated}),
        (DataError, "matches nothing", {"patterns": ["none/*.png"]}),
        (ConfigError, "overlay", {"maps": "bmp"}),
        (ConfigError, "at least 1", {"workers": 0}),
        (ConfigError, "bit_depth is 17", {"bit_depth": 17}),
    ):
        with pytest.raises(error, match=message):
            open_ray_run(**{"model": model, "patterns": [photos], "out": out, **options})
    assert not out.exists() or not list(out.iterdir())
    ray_run = open_ray_run(model, [photos], out)
    for options, message in (
        ({"device": "cuda:1"}, "Ray assigns"),
        ({"ray_workers": 0}, "at least 1"),
        ({"gpus_per_worker": 1.5}, "whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict_with_ray(ray_run, **options)


def test_without_ray(model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fastbgad\[ray\]'"):
        open_ray_run(model, [photos], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ray_is_started_quietly_and_left_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def init(**options: Any) -> None:
        calls.append(("init", {**options, "usage": os.environ.get("RAY_USAGE_STATS_ENABLED")}))
        if options["address"] == "auto":
            raise ConnectionError("nobody there\nat all")

    running = False
    monkeypatch.setattr(ray, "is_initialized", lambda: running)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append(("shutdown", {})))
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    environment, level = dict(os.environ), logging.getLogger("ray").level
    with pytest.raises(RuntimeError, match="inside"), ray_session():
        raise RuntimeError("inside")
    (_, options), last = calls
    assert last == ("shutdown", {})
    assert options["address"] == "local"
    assert options["include_dashboard"] is False
    assert options["usage"] == "0"
    calls.clear()
    with (
        pytest.raises(BackendError, match="no Ray cluster answers at 'auto': nobody there; start one"),
        ray_session("auto"),
    ):
        pass
    running = True
    calls.clear()
    with ray_session():
        pass
    assert calls == []
    assert (dict(os.environ), logging.getLogger("ray").level) == (environment, level)


def test_columns_are_those_of_the_local_engine(photos: Path, tmp_path: Path) -> None:
    run = opened(photos, tmp_path / "out")
    run.folder.join(run.parts)
    assert (tmp_path / "out" / CSV_FILE).read_text().splitlines()[0] == ",".join(COLUMNS)
