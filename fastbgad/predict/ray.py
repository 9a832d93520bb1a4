"""Scores for millions of images: shards of a list, spread over workers and machines by Ray Data.

A shard is the unit of work (one row of the dataset), of output (one file, written whole) and of retrying: a worker that
crashes loses the shard that it works on and nothing else. Only the numbers of shards travel through Ray.

Decoding is not a Ray Data stage: pixels would go through the object store, the full-size image of an overlay too, and
a shard's images would be collected only in a further stage. Instead a worker's threads decode the next batch and write
the last one's maps while its model works, with the code of the local engine, so that both engines give the same
numbers. The memory is that of one model and three batches per worker, however many images there are.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    FastBGADError,
    FeatureError,
    OutputError,
)
from ..model.detector import BGAD
from ..system.environment import choose_device
from ..system.files import sha256
from ..wording import bullets, count, first_line
from .image_list import Part
from .local import MapFormat, check_options, chosen_depth, map_names, score_images, write_scale
from .ray_session import ray_session, require_ray
from .shards import ShardedRun, ShardFolder, open_run

DEFAULT_SHARD_SIZE = 1000
ATTEMPTS = 3
"""Workers that a shard may crash before it is given up."""

_SHOWN = 20  # messages per shard, and in total
_ERRORS = {
    kind.__name__: kind for kind in (BackendError, CheckpointError, ConfigError, DataError, FeatureError, OutputError)
}


@dataclass(frozen=True)
class Job:
    """The part of a run that every worker is given."""

    model: Path
    model_sha256: str
    folder: ShardFolder
    working_folder: Path
    """The folder that relative names of images start from."""
    maps: MapFormat
    batch_size: int
    workers: int
    bit_depth: int | None


@dataclass(frozen=True)
class RayRun:
    """A bulk prediction whose input has been checked and whose run folder is ready."""

    run: ShardedRun
    job: Job


@dataclass(frozen=True)
class RaySummary:
    """The result of `predict_with_ray`."""

    scored: int
    skipped: int  # done by an earlier call
    failed: int  # could not be read
    messages: tuple[str, ...]  # of the first of them


def open_ray_run(
    model: str | Path,
    patterns: Sequence[str | Path],
    out: str | Path,
    *,
    maps: MapFormat = "overlay",
    resume: bool = False,
    shard_size: int = DEFAULT_SHARD_SIZE,
    batch_size: int = 8,
    workers: int = 2,
    bit_depth: int | None = None,
) -> RayRun:
    """Check model and options, list the images and prepare the run folder; Ray is not started.

    Args:
        model: file of a trained model, to be found at this path by every worker.
        patterns: files, folders and globs, as for `find_images`; the same on every machine.
        out: run folder, see `fastbgad.predict.shards`; on several machines a shared one.
        maps: see `predict_files`; those of a shard are in a folder of their own.
        resume: continue the run in `out`.
        shard_size: images per shard, which a crashed worker loses at most.
        batch_size: images that go through the model together.
        workers: threads of each Ray worker that decode images and write maps.
        bit_depth: see `predict_files`.

    Raises:
        MissingDependencyError: ray is not installed.
        CheckpointError, FeatureError: `model` is no model, or has no calibration.
        DataError, ConfigError, OutputError: see `open_run`.
    """
    require_ray()
    check_options(maps, batch_size, workers, bit_depth)
    loaded = BGAD.load(model)
    loaded.calibration()
    digest = sha256(model)
    depth = chosen_depth(loaded, bit_depth)
    run = open_run(patterns, out, model_sha256=digest, maps=maps, shard_size=shard_size, bit_depth=depth, resume=resume)
    if maps == "png16":
        write_scale(run.folder.path, loaded)
    job = Job(Path(model).absolute(), digest, run.folder, Path.cwd(), maps, batch_size, workers, depth)
    return RayRun(run, job)


def predict_with_ray(
    ray_run: RayRun,
    *,
    device: str = "auto",
    address: str | None = None,
    ray_workers: int | None = None,
    gpus_per_worker: float = 1.0,
    on_images: Callable[[int], None] | None = None,
) -> RaySummary:
    """Score the images that a run folder lacks and join its shards into `scores.csv`.

    Args:
        ray_run: from `open_ray_run`.
        device: auto (GPUs if Ray has any), cpu, or cuda.
        address: of a Ray cluster, see `ray_session`.
        ray_workers: processes with a model each; if None as many as the GPUs, or the CPU cores, allow.
        gpus_per_worker: a fraction lets several workers share a GPU.
        on_images: called with the number of images of every finished shard.

    Raises:
        ConfigError: the device is not available, or an option has an impossible value.
        BackendError: Ray does not start, gives up, or a shard crashed several workers. Finished shards are kept in
            every case.
        CheckpointError, DataError, FeatureError, OutputError: from a worker, as in `predict_files`.
    """
    run = ray_run.run
    _check(device, ray_workers, gpus_per_worker)
    failed, messages, given_up = 0, list[str](), list[Part]()
    if run.waiting:
        waiting = {shard.part.number: shard for shard in run.waiting}
        with ray_session(address) as ray:
            pool = _pool(ray, device, ray_workers, gpus_per_worker, len(waiting))
            for outcome in _outcomes(ray, ray_run.job, [shard.part for shard in run.waiting], pool):
                shard = waiting.pop(outcome["number"])
                if outcome["given_up"]:
                    given_up.append(shard.part)
                    if len(given_up) == ATTEMPTS and len(given_up) + len(waiting) == len(run.waiting):
                        break  # no shard succeeded: the others would not either
                    continue
                failed += outcome["failed"]
                messages += outcome["messages"][: _SHOWN - len(messages)]
                if on_images is not None:
                    on_images(shard.count)
    if given_up:
        raise BackendError(_deaths(run, given_up))
    run.folder.join(run.parts)
    return RaySummary(run.waiting_images - failed, run.count - run.waiting_images, failed, tuple(messages))


class ShardScorer:
    """A worker: a callable for `map_batches` whose batches are shards and whose one column is JSON."""

    def __init__(self, job: Job, device: str) -> None:
        self.job = job
        self.device = device
        self.model: BGAD | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        columns = (batch[name].tolist() for name in ("number", "offset", "size", "count"))
        outcomes = [json.dumps(self.outcome(Part(*values))) for values in zip(*columns, strict=True)]
        return {"outcome": np.array(outcomes, dtype=object)}

    def outcome(self, part: Part) -> dict[str, Any]:
        """Score a shard. An error that the user must see is returned: Ray would wrap it in its own tracebacks."""
        result: dict[str, Any] = {"number": part.number, "failed": 0, "messages": [], "given_up": False}
        try:
            if self.job.folder.begin(part, f"{socket.gethostname()} {os.getpid()}") > ATTEMPTS:
                return {**result, "given_up": True}
            errors = [line[-1] for line in self.score(part) if line[-1]]
        except torch.OutOfMemoryError as error:
            text = f"the GPU's memory does not suffice ({str(error).splitlines()[0]}); give a smaller --batch-size"
            return {**result, "problem": ["BackendError", text]}
        except FastBGADError as error:
            return {**result, "problem": [type(error).__name__, str(error)]}
        return {**result, "failed": len(errors), "messages": errors[:_SHOWN]}

    def score(self, part: Part) -> list[list[str]]:
        """Score the images that a shard lacks, write its file and return all its lines."""
        job, folder = self.job, self.job.folder
        images = folder.names(part)
        if not all(path.is_absolute() for path in images):
            self._enter_working_folder()
        finished = {line[0]: line for line in folder.lines(part, images) or () if not line[-1]}
        if not finished:
            folder.remove_fragments(folder.path / "maps" / folder.maps(part))
        names = {path: f"{folder.maps(part)}/{name}" for path, name in map_names(images).items()}
        batches = score_images(
            self._loaded(),
            [path for path in images if str(path) not in finished],
            names,
            folder.path,
            maps=job.maps,
            batch_size=job.batch_size,
            workers=job.workers,
            bit_depth=job.bit_depth,
        )
        finished |= {line[0]: line for lines in batches for line in lines}
        lines = [finished[str(path)] for path in images]
        folder.write(part, lines)
        return lines

    def _loaded(self) -> BGAD:
        # Not in the constructor: a worker that crashes while it loads the model must have begun a shard, whose attempts
        # are counted; otherwise Ray would start workers for ever.
        if self.model is None:
            model = BGAD.load(self.job.model, device=choose_device(self.device))
            if sha256(self.job.model) != self.job.model_sha256:
                raise CheckpointError(
                    f"{self.job.model} on {socket.gethostname()} is another model than the run began with; "
                    "put the same file on every machine"
                )
            self.model = model
        return self.model

    def _enter_working_folder(self) -> None:
        try:
            os.chdir(self.job.working_folder)
        except OSError as error:
            raise DataError(
                f"the images have relative names, but {socket.gethostname()} has no folder {self.job.working_folder}; "
                "name them by absolute paths that all machines share"
            ) from error


@dataclass(frozen=True)
class _Pool:
    size: int
    device: str
    resources: dict[str, float]


def _check(device: str, ray_workers: int | None, gpus_per_worker: float) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"the device is {device!r}; with Ray give auto, cpu or cuda: Ray assigns the GPUs")
    if ray_workers is not None and ray_workers < 1:
        raise ConfigError(f"the number of Ray workers is {ray_workers}; it must be at least 1")
    if gpus_per_worker <= 0 or (gpus_per_worker > 1 and gpus_per_worker != int(gpus_per_worker)):
        raise ConfigError(f"a worker is to have {gpus_per_worker:g} GPUs; give a fraction up to 1, or a whole number")


def _pool(ray: Any, device: str, ray_workers: int | None, gpus_per_worker: float, shards: int) -> _Pool:
    total = ray.cluster_resources()
    gpus, cores = total.get("GPU", 0.0), total.get("CPU", 0.0)
    if device == "auto":
        device = "cuda" if gpus >= gpus_per_worker else "cpu"
    if device == "cuda":
        if gpus < gpus_per_worker:
            raise ConfigError(f"a worker is to have {gpus_per_worker:g} GPUs, but Ray has {gpus:g}; take --device cpu")
        return _Pool(min(ray_workers or int(gpus / gpus_per_worker), shards), device, {"num_gpus": gpus_per_worker})
    if cores < 1:
        raise ConfigError(f"a worker needs a CPU core, but Ray has {cores:g}")
    # A core each: one thread per model wastes nothing on waiting for other threads.
    return _Pool(min(ray_workers or int(cores), shards), device, {"num_cpus": 1})


def _outcomes(ray: Any, job: Job, parts: Sequence[Part], pool: _Pool) -> Iterator[dict[str, Any]]:
    """Yield the workers' outcome of each shard, as they finish; raise the errors that they return."""
    # A block per shard: Ray Data hands out blocks, and tells of a block when all of it is done.
    shards = ray.data.from_items([vars(part) for part in parts], override_num_blocks=len(parts))
    context = shards.context  # a copy of the process's own
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a shard may take its time
    dataset = shards.map_batches(
        ShardScorer,
        batch_size=1,
        # One shard at a time per worker: a shard that waits behind another could be had by a free worker.
        compute=ray.data.ActorPoolStrategy(size=pool.size, max_tasks_in_flight_per_actor=1),
        fn_constructor_args=(job, pool.device),
        **pool.resources,
    )
    batches = iter(dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"))
    try:
        for batch in batches:
            for text in batch["outcome"]:
                outcome = json.loads(text)
                if "problem" in outcome:
                    kind, message = outcome["problem"]
                    raise _ERRORS.get(kind, FastBGADError)(message)
                yield outcome
    except ray.exceptions.RayTaskError:
        raise  # a bug: its traceback says where
    except ray.exceptions.RayError as error:
        raise BackendError(
            f"Ray gave up ({first_line(error)}); finished shards are kept, --resume continues with the others"
        ) from error
    finally:
        if hasattr(batches, "close"):
            batches.close()


def _deaths(run: ShardedRun, given_up: Sequence[Part]) -> str:
    shown = []
    for part in given_up[:_SHOWN]:
        images = run.folder.names(part)
        shown.append(f"shard {part.number}: {images[0]} to {images[-1]}")
    listing = bullets(shown, _SHOWN, total=len(given_up))
    each = "" if len(given_up) == 1 else " each"
    return (
        f"{count(len(given_up), 'shard')}{each} crashed {ATTEMPTS} workers. Likely causes: not enough memory (use a "
        "smaller --batch-size or fewer --ray-workers), or an image that crashes its decoder (--shard-size 1 in another "
        f"folder finds it). Finished shards are kept, --resume tries the others again:\n{listing}"
    )
