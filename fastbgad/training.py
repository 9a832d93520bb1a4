"""Training: two phases over features that are extracted once, resumable to the bit.

Phase one (the first meta epoch) fits the flows to normal patches by maximum likelihood; phase two adds the loss of
the method. Each level's flow takes a step on every chunk of patches. Where a run stands is a pass and a batch; all
random choices follow from the seed and that place (`fastbgad.schedule`).
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration import stored_log_likelihoods
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .data import AnomalySynthesis, AugmentedAnomalies, Split, stream_batches
from .errors import CheckpointError, ConfigError, DataError, FastBGADError, FeatureError
from .features import FeatureStore, Placement, extract_into
from .files import make_folder, write_json, write_text
from .interrupt import interrupt_flag
from .loss_record import COLUMNS, loss_row, mean_losses
from .losses import training_loss
from .model import BGAD
from .ops import PositionalRows
from .schedule import image_batches, learning_rate, patch_chunks
from .scoring import calibrate

STATE_FILE = "training.safetensors"
MODEL_FILE = "model.safetensors"
LOG_FILE = "log.jsonl"
CONFIG_FILE = "config.json"

Record = dict[str, float]


class InterruptedTraining(FastBGADError):
    """Training stopped on request; its state is saved and the message says how to go on."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, handed to the `on_progress` callback after every batch."""

    stage: str  # "statistics", "features", "training" or "calibration"
    done: int  # images so far in this stage
    total: int  # images of this stage
    images_per_second: float
    record: Record  # the latest means of the pass: loss, boundaries, learning rate


@dataclass(frozen=True)
class FitResult:
    """What a run did."""

    history: list[Record]  # one record per pass
    seconds: float  # wall time of this call
    feature_seconds: float  # of which fitting the backbone's statistics and extracting features


def fit(
    model: BGAD,
    split: Split,
    config: TrainConfig,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    placement: Placement = "auto",
    workers: int = 2,
    on_progress: Callable[[Progress], None] | None = None,
) -> FitResult:
    """Trains the model's flows, then calibrates it on the training normals.

    Args:
        model: trained in place; its backbone is fitted first if it needs that.
        split: training normals and known anomalies, see `fastbgad.data.split_known_anomalies`.
        config: method, losses, schedule.
        run_dir: where checkpoints, the log and the final model go; None keeps everything in memory.
        resume: continue the run in `run_dir`, bit for bit on the same machine; a finished run returns at once.
        placement: where features are kept, see `fastbgad.features`.
        workers: threads that decode images.
        on_progress: called after every batch of images.

    Returns:
        `FitResult`; the model holds the trained flows and its calibration.

    Raises:
        ConfigError, DataError: the method and the split do not fit together.
        CheckpointError: nothing to resume, or the run in `run_dir` had another configuration.
        InterruptedTraining: Ctrl-C; the state up to the last batch is saved if there is a `run_dir`.
        FeatureError: features that are not finite, or a loss that diverged.
    """
    if resume and run_dir is None:
        raise ConfigError("resume=True needs run_dir, the folder of the run to continue")
    if not split.normals:
        raise DataError("there is no normal image to train on")
    if config.uses_anomalies and not split.known_anomalies:
        raise DataError(f"method {config.method!r} learns from anomalies, but none is known: raise num_anomalies")
    if run_dir is not None:
        _check_run_dir(Path(run_dir), resume)
    run = TrainingRun(model, split, config, Path(run_dir) if run_dir is not None else None, placement, workers)
    run.on_progress = on_progress
    try:
        return run.fit(resume)
    finally:
        run.store.close()


def _check_run_dir(run_dir: Path, resume: bool) -> None:
    """Refuses a folder that cannot be used before any image is read."""
    make_folder(run_dir)
    has_state = (run_dir / STATE_FILE).is_file()
    if resume and not has_state:
        raise CheckpointError(f"nothing to resume in {run_dir}: it has no {STATE_FILE}; train without resume")
    if not resume and (has_state or (run_dir / MODEL_FILE).is_file()):
        raise ConfigError(f"{run_dir} already holds a run; resume it, or choose another folder")


class TrainingRun:
    """The state of one run: flows, optimiser, features, and the place in the schedule."""

    store: FeatureStore

    def __init__(
        self,
        model: BGAD,
        split: Split,
        config: TrainConfig,
        run_dir: Path | None,
        placement: Placement,
        workers: int,
    ) -> None:
        self.started = time.perf_counter()
        self.model, self.split, self.config = model, split, config
        self.run_dir, self.workers = run_dir, workers
        self.device = model.device
        self.on_progress: Callable[[Progress], None] | None = None
        known = split.known_anomalies if config.uses_anomalies else ()
        recipe = AnomalySynthesis(repeat=config.anomalies.repeat, cut_paste=config.anomalies.cut_paste)
        self.anomalies = AugmentedAnomalies(known, split.normals, recipe, model.image_size, config.seed)
        self.passes = config.schedule.meta_epochs * config.schedule.sub_epochs
        self.pass_index, self.batch_index = 0, 0
        self.history: list[Record] = []
        self.sums = torch.zeros(len(model.flows), COLUMNS, dtype=torch.float64, device=self.device)
        self.fresh_synthesis = -1

        # Slots of the feature store: normals, known anomalies as they are, then their synthesised variants.
        normals, first_synthetic = len(split.normals), len(split.normals) + len(known)
        self.normal_items = torch.arange(normals)
        self.synthetic = [i for i in range(len(self.anomalies)) if self.anomalies.is_synthetic(i)]
        slot_of_synthetic = {index: first_synthetic + k for k, index in enumerate(self.synthetic)}
        slot_of_known = {sample: normals + k for k, sample in enumerate(known)}
        self.synthetic_slots = list(slot_of_synthetic.values())
        anomalous_items = [
            slot_of_synthetic.get(i, slot_of_known[self.anomalies.source(i)]) for i in range(len(self.anomalies))
        ]
        self.all_items = torch.cat([self.normal_items, torch.tensor(anomalous_items, dtype=torch.int64)])

        if model.backbone.needs_fit:
            images = (batch.images.to(self.device) for batch in self._batches(split.normals, "statistics"))
            model.backbone.fit(images)
        slots = first_synthetic + len(self.synthetic)
        self.store = FeatureStore(
            model.backbone,
            model.image_size,
            slots,
            device=self.device,
            placement=placement,
            folder=run_dir,
            cell_labels=config.anomalies.cell_labels,
        )
        parameters = [p for p in model.flows.parameters() if p.requires_grad]
        # One optimiser over all levels: with adam_coasting the idle ones step on zero gradients, otherwise not at all.
        self.optimizer = torch.optim.Adam(parameters, lr=config.schedule.lr, fused=True)

    # ---------------------------------------------------------------- the run

    def fit(self, resume: bool) -> FitResult:
        """The whole run, from features to the calibrated model."""
        if self.run_dir is not None:
            self._open_run(self.run_dir, resume)
        self._extract_features()
        feature_seconds = time.perf_counter() - self.started
        with interrupt_flag() as interrupted:
            while self.pass_index < self.passes:
                self._train_pass(interrupted)
        self._calibrate()
        if self.run_dir is not None:
            known = self._known_names()
            history = {"config": self.config.as_dict(), "passes": self.history, "known_anomalies": known}
            self.model.save(self.run_dir / MODEL_FILE, history)
        return FitResult(self.history, time.perf_counter() - self.started, feature_seconds)

    def _train_pass(self, interrupted: threading.Event) -> None:
        """One pass over the training images, from `batch_index` on."""
        schedule = self.config.schedule
        meta_epoch, sub_epoch = divmod(self.pass_index, schedule.sub_epochs)
        first_phase = meta_epoch == 0
        items = self._items(self.pass_index)
        if not first_phase:
            self._refresh_synthesis()
        batches = image_batches(items, schedule.batch_size, self.config.seed, self.pass_index)
        clock, seen = time.perf_counter(), 0
        lr = schedule.lr
        while self.batch_index < len(batches):
            progress = (sub_epoch + self.batch_index / len(batches)) / schedule.sub_epochs
            lr = learning_rate(schedule, meta_epoch, progress)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            slots = batches[self.batch_index]
            for level in range(len(self.model.flows)):
                self._train_level(level, slots, first_phase)
            self.batch_index += 1
            seen += len(slots)
            speed = seen / (time.perf_counter() - clock)
            done = self._images_before(self.pass_index) + min(self.batch_index * schedule.batch_size, len(items))
            self._report("training", done, self._images_before(self.passes), speed, partial(self._record, lr))
            if interrupted.is_set() and self.batch_index < len(batches):
                self._stop()
        record = self._record(lr) | {"images_per_second": seen / max(time.perf_counter() - clock, 1e-9)}
        if not all(map(math.isfinite, record.values())):
            raise FeatureError(
                f"training diverged in pass {self.pass_index + 1} of {self.passes} (the loss is not finite); lower the "
                f"learning rate (lr is {schedule.lr:g})"
            )
        self.history.append(record)
        self.pass_index, self.batch_index = self.pass_index + 1, 0
        self.sums.zero_()
        if self.run_dir is not None:
            self._write_log()
            if self.pass_index % schedule.sub_epochs == 0:
                self.save_state()
        if interrupted.is_set() and self.pass_index < self.passes:
            self._stop()

    def _items(self, pass_index: int) -> Tensor:
        """The slots a pass goes through: normals alone in phase one, then the known anomalies as well."""
        return self.normal_items if pass_index < self.config.schedule.sub_epochs else self.all_items

    def _images_before(self, pass_index: int) -> int:
        first_phase = min(pass_index, self.config.schedule.sub_epochs)
        return first_phase * len(self.normal_items) + (pass_index - first_phase) * len(self.all_items)

    def _train_level(self, level: int, slots: Tensor, first_phase: bool) -> None:
        """Optimiser steps of one level on all patches of a batch of images."""
        channels, height, width = self.store.shapes[level]
        flow, condition_channels = self.model.flow(level), self.model.flow_config.condition_channels
        key = (self.config.seed, self.pass_index, self.batch_index, level)
        for slot, position in patch_chunks(slots, height * width, self.config.schedule.chunk_rows, key):
            rows = self.store.rows(level, slot, position)
            anomalous = self.store.labels(level, rows)
            patches = self.store.patches(level)
            if patches is not None:
                where = PositionalRows(height, width, channels=condition_channels) if condition_channels else None
                lp = flow(patches, where, rows=rows).log_likelihood
            else:
                where = PositionalRows(height, width, position, condition_channels) if condition_channels else None
                lp = flow(self.store.gather(level, rows), where).log_likelihood
            loss = training_loss(lp, anomalous, channels, self.config.method, self.config.loss, first_phase=first_phase)
            self.optimizer.zero_grad(set_to_none=not self.config.schedule.adam_coasting)
            loss.total.backward()
            self.optimizer.step()
            self.sums[level] += loss_row(loss)

    def _record(self, lr: float) -> Record:
        """The means of the pass so far; the only place that waits for the device."""
        return {"pass": self.pass_index + 1, "lr": lr, **mean_losses(self.sums)}

    # ---------------------------------------------------------------- features

    def _extract_features(self) -> None:
        samples = [*self.split.normals, *self.anomalies.known]
        place = iter(range(len(samples)))
        extract_into(
            self.store,
            self.model.backbone,
            (
                ([next(place) for _ in batch.samples], batch.images, batch.masks)
                for batch in self._batches(samples, "features")
            ),
        )

    def _refresh_synthesis(self) -> None:
        """Makes and extracts the synthesised anomalies of this pass, unless they are there already."""
        generation = self.pass_index // self.config.anomalies.refresh
        if generation == self.fresh_synthesis or not self.synthetic:
            return

        def batches() -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
            size = self.config.schedule.batch_size
            for start in range(0, len(self.synthetic), size):
                made = [self.anomalies.get(generation, i) for i in self.synthetic[start : start + size]]
                yield (
                    self.synthetic_slots[start : start + size],
                    torch.stack([sample.image for sample in made]),
                    torch.stack([sample.mask for sample in made]),
                )

        extract_into(self.store, self.model.backbone, batches())
        self.fresh_synthesis = generation

    def _batches(self, samples: Sequence[Any], stage: str) -> Iterator[Any]:
        clock, done = time.perf_counter(), 0
        for batch in stream_batches(samples, self.model.image_size, self.config.schedule.batch_size, self.workers):
            yield batch
            done += len(batch.samples)
            self._report(stage, done, len(samples), done / (time.perf_counter() - clock), dict)

    def _calibrate(self) -> None:
        """Log-likelihoods of all training normals, and from them the constants of the model."""
        count, size = len(self.split.normals), self.config.schedule.batch_size
        with torch.inference_mode():
            levels = stored_log_likelihoods(self.model, self.store, count, size)
            loss = self.config.loss
            self.model.set_calibration(
                calibrate(levels, self.model.image_size, beta=loss.beta, tau=loss.tau, normalizer=loss.normalizer)
            )

    # ---------------------------------------------------------------- files

    def _open_run(self, run_dir: Path, resume: bool) -> None:
        if resume:
            self.load_state()
            return
        write_json(
            run_dir / CONFIG_FILE, {"architecture": self.model.architecture(), "training": self.config.as_dict()}
        )
        self._write_log()

    def _known_names(self) -> list[str]:
        return [sample.name for sample in self.split.known_anomalies]

    def identity(self) -> dict[str, Any]:
        """What a state belongs to: a run goes on only with the same model, configuration and images."""
        return {
            "architecture": self.model.architecture(),
            "backbone": self.model.backbone.fingerprint(),
            "training": self.config.as_dict(),
            "normals": [sample.image.name for sample in self.split.normals],
            "known_anomalies": self._known_names(),
        }

    def save_state(self) -> None:
        """Writes everything that the run needs to go on bit for bit."""
        assert self.run_dir is not None
        tensors = {f"flows.{name}": tensor for name, tensor in self.model.flows.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in state.items()}
        tensors["sums"] = self.sums
        place = {"pass": self.pass_index, "batch": self.batch_index, "history": self.history}
        save_checkpoint(self.run_dir / STATE_FILE, "training", tensors, {"identity": self.identity(), "place": place})

    def load_state(self) -> None:
        """Takes up the state in the run's folder; raises `CheckpointError` if it belongs to another run."""
        assert self.run_dir is not None
        path = self.run_dir / STATE_FILE
        tensors, metadata = load_checkpoint(path, "training")
        ours = json.loads(json.dumps(self.identity()))
        different = [name for name, value in ours.items() if metadata["identity"].get(name) != value]
        if different:
            raise CheckpointError(
                f"{path} belongs to another run: it differs in {', '.join(different)}; resume with the configuration "
                f"in {self.run_dir / CONFIG_FILE} and the same images, or choose another folder"
            )
        flows = {name.removeprefix("flows."): t for name, t in tensors.items() if name.startswith("flows.")}
        self.model.flows.load_state_dict(flows)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.sums.copy_(tensors["sums"])
        place = metadata["place"]
        self.pass_index, self.batch_index, self.history = place["pass"], place["batch"], place["history"]
        # Lines of passes that the state does not know are taken back.
        self._write_log()

    def _write_log(self) -> None:
        assert self.run_dir is not None
        write_text(self.run_dir / LOG_FILE, "".join(json.dumps(record) + "\n" for record in self.history))

    def _stop(self) -> None:
        if self.run_dir is None:
            raise InterruptedTraining("training was interrupted; without run_dir there is nothing to resume from")
        self.save_state()
        raise InterruptedTraining(
            f"training was interrupted after {self.pass_index} of {self.passes} passes; its state is saved: go on with "
            f"the same command and --resume (run folder {self.run_dir})"
        )

    def _report(self, stage: str, done: int, total: int, speed: float, record: Callable[[], Record]) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(stage, done, total, speed, record()))
