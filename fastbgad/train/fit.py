"""Training: two phases over features that are extracted once, resumable to the bit.

Phase one (the first meta epoch) fits the flows to normal patches by maximum likelihood; phase two adds the loss of
the method. Each level's flow takes a step on every chunk of patches. A run's progress point is a pass and a batch; all
random choices follow from the seed and that point (`schedule`).

Parts of a run in other modules: `items` (the images and their slots), `state` (the files), `level` (levels are trained
side by side, nothing waits for the device), `graph` (a step is one call), `synthesis_ahead` (anomalies are synthesized
during training), `data_parallel` (several processes share a run).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..config import TrainConfig
from ..data import DecodedImages, Split
from ..data.content import named_digests
from ..errors import ConfigError, FeatureError, InterruptedTraining
from ..features import ImageFeatures, ImageReading, Placement, StoreOptions
from ..model.detector import BGAD
from ..progress import Progress, Record
from ..system.interrupt import interrupt_flag
from .calibration import calibrate_run
from .data_parallel import DataParallel, SharedRows
from .items import RunItems, check_images, without_vanished
from .level import LevelTrainer
from .loss_record import mean_losses
from .schedule import image_batches, learning_rate, patch_chunks, patch_rows
from .state import ProgressPoint, RunFolder, check_run_folder, run_identity
from .synthesis_ahead import SLOT_SETS, SynthesisAhead

# Seconds between readings of the losses while training on a GPU: each of them waits for the device.
_READ_EVERY = 1.0


@dataclass(frozen=True)
class FitResult:
    """The result of `fit`."""

    history: list[Record]  # one record per pass
    seconds: float  # wall time of this call
    feature_seconds: float  # of which fitting the backbone's statistics and extracting features
    known_beyond: dict[str, int]  # number of known anomalies beyond b_n and b_a; empty for methods without any


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not change its results; see `fit`."""

    run_dir: Path | None = None
    features: ImageFeatures | None = None
    placement: Placement = "auto"
    workers: int = 2
    parallel: DataParallel | None = None
    on_progress: Callable[[Progress], None] | None = None
    on_meta_epoch: Callable[[int], None] | None = None


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
    """Train the model's flows, then calibrate it on the training normals.

    Args:
        model: trained in place; its backbone is fitted first if it needs that.
        split: training normals and known anomalies, see `fastbgad.data.split_known_anomalies`.
        config: method, losses, schedule.
        run_dir: folder for checkpoints, the log and the final model; None keeps everything in memory.
        resume: continue the run in `run_dir`, bit for bit on the same machine; a finished run returns at once.
        features: of the images, shared with other runs (with `spare_slots` spare slots); None makes them for this run.
        placement: of features made for this run, see `fastbgad.features.StoreOptions`.
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
    folder = Path(run_dir) if run_dir is not None else None
    options = RunOptions(folder, features, placement, workers, parallel, on_progress, on_meta_epoch)
    _check(split, config, options, resume)
    run = TrainingRun(model, split, config, options)
    try:
        return run.fit(resume)
    finally:
        run.close()


def spare_slots(config: TrainConfig, known_anomalies: int) -> int:
    """Return the number of spare slots that a run needs of features that it shares."""
    return SLOT_SETS * known_anomalies * config.anomalies.cut_paste if config.uses_anomalies else 0


def _check(split: Split, config: TrainConfig, options: RunOptions, resume: bool) -> None:
    """Raise an error for what cannot be trained, before any image is read."""
    if resume and options.run_dir is None:
        raise ConfigError("resume=True needs run_dir, the folder of the run to continue")
    if options.features is not None and options.parallel is not None:
        raise ConfigError("features of one process cannot be shared with others: leave features or parallel out")
    check_images(split, config)
    if options.run_dir is not None:
        check_run_folder(options.run_dir, resume=resume)


class TrainingRun:
    """A run: a trainer per level, the items and their features, and the progress point."""

    def __init__(self, model: BGAD, split: Split, config: TrainConfig, options: RunOptions) -> None:
        self.started: float = time.perf_counter()
        self.model: BGAD = model
        self.split: Split = split
        self.config: TrainConfig = config
        self.options: RunOptions = options
        self.parallel: DataParallel | None = options.parallel
        self.device: torch.device = model.device
        self.is_first: bool = self.parallel is None or self.parallel.rank == 0
        self.passes: int = config.schedule.meta_epochs * config.schedule.sub_epochs
        self.point: ProgressPoint = ProgressPoint()
        self.last_read: tuple[float, Record] = (-math.inf, Record())
        self.known_beyond: dict[str, int] = {}
        # Taken now: at the end of a long training the files may have changed.
        self.known_files: dict[str, str] = named_digests(split.known_anomalies) if options.run_dir is not None else {}
        shared = options.features
        decoded = shared.decoded if shared is not None else DecodedImages(model.image_size)
        usable = without_vanished(split, config, decoded)
        self.items: RunItems = RunItems(usable, config, model.image_size, decoded, self.parallel)
        spare = SLOT_SETS * len(self.items.own_synthetic)
        self.features: ImageFeatures = shared if shared is not None else self._own_features(decoded, spare)
        self.features.check(model.backbone, model.image_size, config.anomalies.cell_labels, spare)
        self.synthesis: SynthesisAhead = SynthesisAhead(
            self.items.anomalies,
            self.items.own_synthetic,
            self.features,
            self._generation(self.passes - 1) + 1,
            options.workers,
        )
        self.items.set_file_slots(self.features.slots(self.items.own_files))
        self.levels: list[LevelTrainer] = [
            LevelTrainer(level, model.flow(level), self.features.store, config, self.parallel)
            for level in range(len(model.flows))
        ]
        self.folder: RunFolder | None = None
        if options.run_dir is not None:
            self.folder = RunFolder(options.run_dir, run_identity(model, split, config), writes=self.is_first)

    def _own_features(self, decoded: DecodedImages, spare: int) -> ImageFeatures:
        """Return features of the files that this process holds; fits the backbone if it needs that."""
        flow_dtype = next(self.model.flows.parameters()).dtype
        store = StoreOptions(
            device=self.device,
            placement=self.options.placement,
            folder=self.options.run_dir,
            # a flow in float64 is not fed with rounded features
            dtype=torch.float64 if flow_dtype == torch.float64 else None,
            cell_labels=self.config.anomalies.cell_labels,
        )
        reading = ImageReading(
            self.config.schedule.batch_size, self.options.workers, decoded, on_images=self._report_images
        )
        return ImageFeatures(
            self.model.backbone,
            self.model.image_size,
            self.items.own_files,
            self.split.normals,
            spare,
            store=store,
            reading=reading,
        )

    def close(self) -> None:
        """Stop the threads of the synthesis, and free the features unless they are shared."""
        self.synthesis.close()
        if self.options.features is None:
            self.features.close()

    def fit(self, resume: bool) -> FitResult:
        """Extract the features, train all passes that are left, calibrate and save the model."""
        if self.folder is not None:
            self.point = self.folder.open(self.levels, resume=resume)
        self.features.extract(self.items.own_files)
        feature_seconds = time.perf_counter() - self.started
        sub_epochs, on_meta_epoch = self.config.schedule.sub_epochs, self.options.on_meta_epoch
        with interrupt_flag() as interrupted:
            while self.point.pass_index < self.passes:
                self._train_pass(interrupted)
                if on_meta_epoch is not None and self.point.pass_index % sub_epochs == 0:
                    on_meta_epoch(self.point.pass_index // sub_epochs - 1)
        self.known_beyond = calibrate_run(self.model, self.config, self.items, self.features, self.parallel)
        if self.folder is not None:
            self.folder.save_model(self.model, self._model_history())
        seconds = time.perf_counter() - self.started
        return FitResult(self.point.history, seconds, feature_seconds, self.known_beyond)

    def _train_pass(self, interrupted: threading.Event) -> None:
        """Train one pass over the images, from the progress point on."""
        schedule, point = self.config.schedule, self.point
        meta_epoch, sub_epoch = divmod(point.pass_index, schedule.sub_epochs)
        first_phase = meta_epoch == 0
        items = self.items.first_phase if first_phase else self.items.second_phase
        if not first_phase:
            self.items.set_synthetic_slots(self.synthesis.take(self._generation(point.pass_index)))
        batches = image_batches(items, schedule.batch_size, self.config.seed, point.pass_index)
        clock, seen = time.perf_counter(), 0
        lr = schedule.lr
        for trainer in self.levels:
            trainer.begin()
        while point.batch_index < len(batches):
            batch = batches[point.batch_index]
            progress = (sub_epoch + point.batch_index / len(batches)) / schedule.sub_epochs
            lr = learning_rate(schedule, meta_epoch, progress)
            self._train_batch(batch, lr, first_phase)
            point.batch_index += 1
            seen += len(batch)
            speed = seen / (time.perf_counter() - clock)
            done = self._images_before(point.pass_index) + min(point.batch_index * schedule.batch_size, len(items))
            self._report("training", done, self._images_before(self.passes), speed, partial(self._latest_record, lr))
            if self._stops(interrupted) and point.batch_index < len(batches):
                self._stop()
        self._finish_pass(lr, seen, clock)
        if self._stops(interrupted) and point.pass_index < self.passes:
            self._stop()

    def _train_batch(self, batch: Tensor, lr: float, first_phase: bool) -> None:
        """Take the optimizer steps of every level on all patches of a batch of images."""
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
        """Return the chunks of a batch's patches at one level, in random order."""
        area, rows, slots = trainer.area, self.config.schedule.chunk_rows, self.items.slots
        key = (self.config.seed, self.point.pass_index, self.point.batch_index, trainer.level)
        if self.parallel is None:
            return patch_rows(slots[batch], area, rows, key)
        share = self.parallel.share
        return (share(items, positions, slots, area) for items, positions in patch_chunks(batch, area, rows, key))

    def _finish_pass(self, lr: float, seen: int, clock: float) -> None:
        """Record a pass and move on to the next one; save the state after a meta epoch."""
        for trainer in self.levels:
            trainer.end()
        record = self._record(lr) | {"images_per_second": seen / max(time.perf_counter() - clock, 1e-9)}
        if not all(map(math.isfinite, record.values())):
            raise FeatureError(
                f"training diverged in pass {self.point.pass_index + 1} of {self.passes} (the loss is not finite); "
                f"lower the learning rate (lr is {self.config.schedule.lr:g})"
            )
        self.point.history.append(record)
        self.point.pass_index, self.point.batch_index = self.point.pass_index + 1, 0
        for trainer in self.levels:
            trainer.sums.zero_()
        if self.folder is not None:
            self.folder.write_log(self.point)
            if self.point.pass_index % self.config.schedule.sub_epochs == 0:
                self.folder.save_state(self.levels, self.point)

    def _model_history(self) -> dict[str, object]:
        """Return what the saved model tells of its training."""
        history: dict[str, object] = {
            "config": self.config.as_dict(),
            "passes": self.point.history,
            "known_anomalies": [sample.name for sample in self.split.known_anomalies],
            "known_anomaly_files": self.known_files,
        }
        if self.known_beyond:
            history["known_anomalies_beyond"] = self.known_beyond
        if (depth := self.split.normals[0].decoding.bit_depth) is not None:
            history["bit_depth"] = depth
        return history

    def _generation(self, pass_index: int) -> int:
        """Return the number of the set of synthesized anomalies that a pass uses."""
        return pass_index // self.config.anomalies.refresh

    def _images_before(self, pass_index: int) -> int:
        first_phase = min(pass_index, self.config.schedule.sub_epochs)
        items = self.items
        return first_phase * len(items.first_phase) + (pass_index - first_phase) * len(items.second_phase)

    def _record(self, lr: float) -> Record:
        """Return the means of the pass so far; waits for the device."""
        for trainer in self.levels:
            trainer.end()
        sums = torch.stack([trainer.sums for trainer in self.levels])
        return {"pass": self.point.pass_index + 1, "lr": lr, **mean_losses(sums)}

    def _latest_record(self, lr: float) -> Record:
        """Return `_record`, on a GPU read no more often than every `_READ_EVERY` seconds."""
        now = time.perf_counter()
        if self.device.type != "cuda" or now - self.last_read[0] > _READ_EVERY:
            self.last_read = (now, self._record(lr))
        return self.last_read[1]

    def _stops(self, interrupted: threading.Event) -> bool:
        """Return True to stop here; processes that share a run all stop at the same point."""
        if self.parallel is not None:
            return self.parallel.any(interrupted.is_set(), self.device)
        return interrupted.is_set()

    def _stop(self) -> None:
        """Save the state and raise `InterruptedTraining`."""
        for trainer in self.levels:
            trainer.end()
        if self.folder is None:
            raise InterruptedTraining("training was interrupted; without run_dir there is nothing to resume from")
        self.folder.save_state(self.levels, self.point)
        raise InterruptedTraining(
            f"training was interrupted after {self.point.pass_index} of {self.passes} passes; its state is saved: "
            f"continue with the same command and --resume (run folder {self.folder.path})"
        )

    def _report_images(self, stage: str, done: int, total: int, images_per_second: float) -> None:
        self._report(stage, done, total, images_per_second, dict)

    def _report(self, stage: str, done: int, total: int, speed: float, record: Callable[[], Record]) -> None:
        if self.options.on_progress is not None:
            self.options.on_progress(Progress(stage, done, total, speed, record()))
