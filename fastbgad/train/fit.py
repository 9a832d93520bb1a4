"""Training: two phases over features that are extracted once, resumable to the bit.

Phase one (the first meta epoch) fits the flows to normal patches by maximum likelihood; phase two adds the loss of
the method. Each level's flow takes a step on every chunk of patches. Where a run stands is a pass and a batch; all
random choices follow from the seed and that place (`fastbgad.train.schedule`).

What makes it quick stands elsewhere: `image_features` (each image goes through the backbone once), `training_level`
(levels side by side, nothing waits for the device), `training_graph` (a step is one call), `synthesis_ahead`
(anomalies are made while training goes on), `data_parallel` (several processes share a run).
"""

from __future__ import annotations

import json
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..data import AnomalySynthesis, AugmentedAnomalies, DecodedImages, Split
from ..errors import CheckpointError, ConfigError, DataError, FastBGADError, FeatureError, Notice
from ..features.image_features import ImageFeatures
from ..features.store import Placement
from ..model.calibration import calibration_of, stored_log_likelihoods
from ..model.detector import BGAD
from ..ops.dispatch import resolve_matmul_precision
from ..progress import Progress, Record
from ..system.files import make_folder, write_json, write_text
from ..system.interrupt import interrupt_flag
from .data_parallel import DataParallel, SharedRows
from .level import LevelTrainer
from .loss_record import mean_losses
from .schedule import image_batches, learning_rate, patch_chunks, patch_rows
from .state import load_training_state, save_training_state
from .synthesis_ahead import BANKS, SynthesisAhead

STATE_FILE = "training.safetensors"
MODEL_FILE = "model.safetensors"
LOG_FILE = "log.jsonl"
CONFIG_FILE = "config.json"

# Seconds between readings of the losses while training on a GPU: each of them waits for the device.
_READ_EVERY = 1.0


class InterruptedTraining(FastBGADError):
    """Training stopped on request; its state is saved and the message says how to go on."""


@dataclass(frozen=True)
class FitResult:
    """What a run did."""

    history: list[Record]  # one record per pass
    seconds: float  # wall time of this call
    feature_seconds: float  # of which fitting the backbone's statistics and extracting features
    known_beyond: dict[str, int]  # how many known anomalies score beyond b_n and b_a; empty for methods without any


def fit(
    model: BGAD,
    split: Split,
    config: TrainConfig,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    features: ImageFeatures | None = None,
    placement: Placement = "auto",
    workers: int = 2,
    parallel: DataParallel | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_meta_epoch: Callable[[int], None] | None = None,
) -> FitResult:
    """Trains the model's flows, then calibrates it on the training normals.

    Args:
        model: trained in place; its backbone is fitted first if it needs that.
        split: training normals and known anomalies, see `fastbgad.data.split_known_anomalies`.
        config: method, losses, schedule.
        run_dir: where checkpoints, the log and the final model go; None keeps everything in memory.
        resume: continue the run in `run_dir`, bit for bit on the same machine; a finished run returns at once.
        features: of the images, shared with other runs (they need `spare_slots` spare ones); None makes its own.
        placement: where own features are kept, see `fastbgad.features`.
        workers: threads that decode images and synthesize anomalies.
        parallel: the processes that share this run. All of them call this with the same arguments; the results are
            those of one process but for rounding, and the first one writes the files.
        on_progress: called after every batch of images.
        on_meta_epoch: called after every meta epoch with its number, counted from 0, while the model holds the flows of
            that moment (and no calibration yet).

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
    if features is not None and parallel is not None:
        raise ConfigError("features of one process cannot be shared with others: leave features or parallel out")
    if not split.normals:
        raise DataError("there is no normal image to train on")
    if config.uses_anomalies and not split.known_anomalies:
        raise DataError(f"method {config.method!r} learns from anomalies, but none is known: raise num_anomalies")
    if run_dir is not None:
        _check_run_dir(Path(run_dir), resume)
    run = TrainingRun(
        model,
        split,
        config,
        Path(run_dir) if run_dir is not None else None,
        features,
        placement,
        workers,
        parallel,
        on_progress,
        on_meta_epoch,
    )
    try:
        return run.fit(resume)
    finally:
        run.close()


def spare_slots(config: TrainConfig, known_anomalies: int) -> int:
    """How many spare slots a run needs of features that it shares."""
    return BANKS * known_anomalies * config.anomalies.cut_paste if config.uses_anomalies else 0


def _dtype_of(model: BGAD) -> torch.dtype:
    return next(model.flows.parameters()).dtype


def _check_run_dir(run_dir: Path, resume: bool) -> None:
    """Refuses a folder that cannot be used before any image is read."""
    make_folder(run_dir)
    has_state = (run_dir / STATE_FILE).is_file()
    if resume and not has_state:
        raise CheckpointError(f"nothing to resume in {run_dir}: it has no {STATE_FILE}; train without resume")
    if not resume and (has_state or (run_dir / MODEL_FILE).is_file()):
        raise ConfigError(f"{run_dir} already holds a run; resume it, or choose another folder")


class TrainingRun:
    """The state of one run: a trainer per level, the features, and the place in the schedule."""

    def __init__(
        self,
        model: BGAD,
        split: Split,
        config: TrainConfig,
        run_dir: Path | None,
        features: ImageFeatures | None,
        placement: Placement,
        workers: int,
        parallel: DataParallel | None,
        on_progress: Callable[[Progress], None] | None,
        on_meta_epoch: Callable[[int], None] | None,
    ) -> None:
        self.started = time.perf_counter()
        self.model, self.split, self.config, self.parallel = model, split, config, parallel
        self.run_dir, self.on_progress, self.on_meta_epoch = run_dir, on_progress, on_meta_epoch
        self.device = model.device
        self.writes = run_dir is not None and (parallel is None or parallel.rank == 0)
        self.passes = config.schedule.meta_epochs * config.schedule.sub_epochs
        self.pass_index, self.batch_index = 0, 0
        self.history: list[Record] = []
        self.last_read = (-math.inf, Record())
        self.known_beyond: dict[str, int] = {}

        # Items are the images of the run, numbered through: normals, known anomalies, then what is synthesized of them.
        known = split.known_anomalies if config.uses_anomalies else ()
        self.files = [*split.normals, *known]
        recipe = AnomalySynthesis(repeat=config.anomalies.repeat, cut_paste=config.anomalies.cut_paste)
        decoded = features.decoded if features is not None else DecodedImages(model.image_size)
        self.anomalies = AugmentedAnomalies(known, split.normals, recipe, model.image_size, config.seed, decoded)
        self.synthetic = [i for i in range(len(self.anomalies)) if self.anomalies.is_synthetic(i)]
        item_of = {index: len(self.files) + k for k, index in enumerate(self.synthetic)}
        item_of_known = {sample: len(split.normals) + k for k, sample in enumerate(known)}
        anomalous = [item_of.get(i, item_of_known[self.anomalies.source(i)]) for i in range(len(self.anomalies))]
        self.normal_items = torch.arange(len(split.normals))
        self.all_items = torch.cat([self.normal_items, torch.tensor(anomalous, dtype=torch.int64)])

        # Which of them this process holds, and where.
        every = range(len(self.files) + len(self.synthetic))
        self.owned = parallel.owned(every) if parallel is not None else list(every)
        self.own_files = [self.files[item] for item in self.owned if item < len(self.files)]
        own_synthetic = [self.synthetic[item - len(self.files)] for item in self.owned if item >= len(self.files)]
        self.shares_features = features is not None
        if features is None:
            features = ImageFeatures(
                model.backbone,
                model.image_size,
                self.own_files,
                split.normals,
                BANKS * len(own_synthetic),
                device=self.device,
                placement=placement,
                folder=run_dir,
                # a flow in float64 is not fed with rounded features
                dtype=torch.float64 if _dtype_of(model) == torch.float64 else None,
                cell_labels=config.anomalies.cell_labels,
                batch_size=config.schedule.batch_size,
                workers=workers,
                decoded=decoded,
                on_images=self._report_images,
            )
        features.check(model.backbone, model.image_size, config.anomalies.cell_labels, BANKS * len(own_synthetic))
        self.features = features
        self.synthesis = SynthesisAhead(
            self.anomalies, own_synthetic, features, self._generation(self.passes - 1) + 1, workers
        )
        self.slots = torch.full((len(every),), -1)  # of every item that this process holds
        self.slots[self.owned[: len(self.own_files)]] = torch.tensor(features.slots(self.own_files), dtype=torch.int64)
        self.levels = [
            LevelTrainer(level, model.flow(level), features.store, config, parallel)
            for level in range(len(model.flows))
        ]

    def close(self) -> None:
        """Stops what goes on in the background, and frees the features unless they are shared."""
        self.synthesis.close()
        if not self.shares_features:
            self.features.close()

    # ---------------------------------------------------------------- the run

    def fit(self, resume: bool) -> FitResult:
        """The whole run, from features to the calibrated model."""
        self._open_run(resume)
        self.features.extract(self.own_files)
        feature_seconds = time.perf_counter() - self.started
        with interrupt_flag() as interrupted:
            while self.pass_index < self.passes:
                self._train_pass(interrupted)
                if self.on_meta_epoch is not None and self.pass_index % self.config.schedule.sub_epochs == 0:
                    self.on_meta_epoch(self.pass_index // self.config.schedule.sub_epochs - 1)
        self._calibrate()
        if self.writes:
            assert self.run_dir is not None
            known = self._known_names()
            history = {"config": self.config.as_dict(), "passes": self.history, "known_anomalies": known}
            if self.known_beyond:
                history["known_anomalies_beyond"] = self.known_beyond
            self.model.save(self.run_dir / MODEL_FILE, history)
        return FitResult(self.history, time.perf_counter() - self.started, feature_seconds, self.known_beyond)

    def _train_pass(self, interrupted: threading.Event) -> None:
        """One pass over the training images, from `batch_index` on."""
        schedule = self.config.schedule
        meta_epoch, sub_epoch = divmod(self.pass_index, schedule.sub_epochs)
        first_phase = meta_epoch == 0
        items = self.normal_items if first_phase else self.all_items
        if not first_phase:
            self._take_synthesis()
        batches = image_batches(items, schedule.batch_size, self.config.seed, self.pass_index)
        clock, seen = time.perf_counter(), 0
        lr = schedule.lr
        for trainer in self.levels:
            trainer.begin()
        while self.batch_index < len(batches):
            progress = (sub_epoch + self.batch_index / len(batches)) / schedule.sub_epochs
            lr = learning_rate(schedule, meta_epoch, progress)
            batch = batches[self.batch_index]
            self._train_batch(batch, lr, first_phase)
            self.batch_index += 1
            seen += len(batch)
            speed = seen / (time.perf_counter() - clock)
            done = self._images_before(self.pass_index) + min(self.batch_index * schedule.batch_size, len(items))
            self._report("training", done, self._images_before(self.passes), speed, partial(self._latest_record, lr))
            if self._stops(interrupted) and self.batch_index < len(batches):
                self._stop()
        for trainer in self.levels:
            trainer.end()
        record = self._record(lr) | {"images_per_second": seen / max(time.perf_counter() - clock, 1e-9)}
        if not all(map(math.isfinite, record.values())):
            raise FeatureError(
                f"training diverged in pass {self.pass_index + 1} of {self.passes} (the loss is not finite); lower the "
                f"learning rate (lr is {schedule.lr:g})"
            )
        self.history.append(record)
        self.pass_index, self.batch_index = self.pass_index + 1, 0
        for trainer in self.levels:
            trainer.sums.zero_()
        if self.writes:
            self._write_log()
            if self.pass_index % schedule.sub_epochs == 0:
                self.save_state()
        if self._stops(interrupted) and self.pass_index < self.passes:
            self._stop()

    def _train_batch(self, batch: Tensor, lr: float, first_phase: bool) -> None:
        """Optimizer steps of every level on all patches of a batch of images."""
        rows = self.config.schedule.chunk_rows
        steps = [math.ceil(len(batch) * trainer.area / rows) for trainer in self.levels]
        for level, trainer in enumerate(self.levels):
            trainer.set_lr(lr)
            if self.config.schedule.adam_coasting:  # idle levels step as well, before their turn and after it
                trainer.coast(sum(steps[:level]))
            trainer.train(self._chunks(trainer, batch), first_phase)
            if self.config.schedule.adam_coasting:
                trainer.coast(sum(steps[level + 1 :]))

    def _chunks(self, trainer: LevelTrainer, batch: Tensor) -> Iterator[Tensor] | Iterator[SharedRows]:
        """The patches of a batch at one level, in random order, chunk by chunk."""
        area, rows = trainer.area, self.config.schedule.chunk_rows
        key = (self.config.seed, self.pass_index, self.batch_index, trainer.level)
        if self.parallel is None:
            return patch_rows(self.slots[batch], area, rows, key)
        share = self.parallel.share
        return (share(items, place, self.slots, area) for items, place in patch_chunks(batch, area, rows, key))

    def _take_synthesis(self) -> None:
        """Waits for the synthesized anomalies of this pass and looks up where they are."""
        own = self.owned[len(self.own_files) :]
        self.slots[own] = torch.tensor(self.synthesis.take(self._generation(self.pass_index)), dtype=torch.int64)

    def _generation(self, pass_index: int) -> int:
        return pass_index // self.config.anomalies.refresh

    def _images_before(self, pass_index: int) -> int:
        first_phase = min(pass_index, self.config.schedule.sub_epochs)
        return first_phase * len(self.normal_items) + (pass_index - first_phase) * len(self.all_items)

    def _record(self, lr: float) -> Record:
        """The means of the pass so far; waits for the device."""
        for trainer in self.levels:
            trainer.end()
        sums = torch.stack([trainer.sums for trainer in self.levels])
        return {"pass": self.pass_index + 1, "lr": lr, **mean_losses(sums)}

    def _latest_record(self, lr: float) -> Record:
        """`_record`, on a GPU no more often than every `_READ_EVERY` seconds."""
        now = time.perf_counter()
        if self.device.type != "cuda" or now - self.last_read[0] > _READ_EVERY:
            self.last_read = (now, self._record(lr))
        return self.last_read[1]

    def _calibrate(self) -> None:
        """Set the model's constants from all training normals, and see on which side the known anomalies lie."""
        normals = len(self.split.normals)
        slots = self.features.slots(self.own_files)
        levels = stored_log_likelihoods(self.model, self.features.store, slots, self.config.schedule.batch_size)
        if self.parallel is not None:
            levels = [self.parallel.gather_images(lp, len(self.files)) for lp in levels]
        self.model.set_calibration(calibration_of(self.model, [lp[:normals] for lp in levels], self.config))
        if normals < len(self.files):
            side = self.model.decide([lp[normals:] for lp in levels]).image_side
            self.known_beyond = {name: int((side >= k).sum()) for k, name in ((1, "b_n"), (2, "b_a"))}
            if self.known_beyond["b_a"] == 0 and (self.parallel is None or self.parallel.rank == 0):
                warnings.warn(
                    f"none of the {len(side)} known anomalies scores beyond the anomalous boundary b_a, so hardly any "
                    "image will be decided to be anomalous; train longer (--schedule.meta-epochs), narrow the margin "
                    f"(--loss.tau, now {self.config.loss.tau:g}), or go by the score",
                    Notice,
                    stacklevel=1,
                )

    # ---------------------------------------------------------------- files

    def _open_run(self, resume: bool) -> None:
        if self.run_dir is None:
            return
        if resume:
            place = load_training_state(self.run_dir / STATE_FILE, self.levels, self.identity())
            self.pass_index, self.batch_index, self.history = place["pass"], place["batch"], place["history"]
        elif self.writes:
            architecture, training = self.model.architecture(), self.config.as_dict()
            write_json(self.run_dir / CONFIG_FILE, {"architecture": architecture, "training": training})
        if self.writes:
            self._write_log()  # lines of passes that the state does not know are taken back

    def _known_names(self) -> list[str]:
        return [sample.name for sample in self.split.known_anomalies]

    def identity(self) -> dict[str, Any]:
        """What a state belongs to: a run goes on only with the same model, configuration and images."""
        return {
            "architecture": self.model.architecture(),
            "backbone": self.model.backbone.fingerprint(),
            "training": self.config.as_dict(),
            "precision": resolve_matmul_precision(self.model.flow(0).matmul_precision),
            "normals": [sample.image.name for sample in self.split.normals],
            "known_anomalies": self._known_names(),
        }

    def save_state(self) -> None:
        """Writes everything that the run needs to go on bit for bit."""
        assert self.run_dir is not None
        place = {"pass": self.pass_index, "batch": self.batch_index, "history": self.history}
        save_training_state(self.run_dir / STATE_FILE, self.levels, self.identity(), place)

    def _write_log(self) -> None:
        assert self.run_dir is not None
        write_text(self.run_dir / LOG_FILE, "".join(json.dumps(record) + "\n" for record in self.history))

    def _stops(self, interrupted: threading.Event) -> bool:
        """Whether to stop here; processes that share a run stop at the same place."""
        if self.parallel is not None:
            return self.parallel.any(interrupted.is_set(), self.device)
        return interrupted.is_set()

    def _stop(self) -> None:
        for trainer in self.levels:
            trainer.end()
        if self.run_dir is None:
            raise InterruptedTraining("training was interrupted; without run_dir there is nothing to resume from")
        if self.writes:
            self.save_state()
        raise InterruptedTraining(
            f"training was interrupted after {self.pass_index} of {self.passes} passes; its state is saved: go on with "
            f"the same command and --resume (run folder {self.run_dir})"
        )

    def _report_images(self, stage: str, done: int, total: int, images_per_second: float) -> None:
        self._report(stage, done, total, images_per_second, dict)

    def _report(self, stage: str, done: int, total: int, speed: float, record: Callable[[], Record]) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(stage, done, total, speed, record()))
