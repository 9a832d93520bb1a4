"""Times of inference from image file to anomaly map, stage by stage: batches for throughput, single images for latency.

Every pass reads a batch of files and runs the stages one after another, and waits for the device after each.
`fastbgad.predict_files` in contrast decodes one batch ahead while the model works, which hides most of the decoding
where the model runs on a GPU.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice

import numpy as np
import torch

from ..backbones import Backbone
from ..config import FlowConfig, LossConfig
from ..errors import ConfigError, FastBGADError, check_choice
from ..model.detector import BGAD
from ..model.scoring import calibrate
from ..ops import Impl, MatmulPrecision, resolve_impl
from ..ops.dispatch import renamed_precision
from .images import BenchImages, truth_masks
from .memory import peak_bytes
from .roofline import Ceilings, flow_bytes, flow_flops, measure_ceilings
from .rows import Mode, Row, Stage
from .stages import DECODE, METRICS, SCORING, UPLOAD, Work, flow_names, load_image

# A median needs few passes; a 99th percentile needs at least a hundred.
_REPEATS = {"throughput": 5, "latency": 100}
# Passes after the timed ones, for the peaks of memory: stage by stage, and of the whole.
_MEMORY_PASSES = 2
_WHOLE = ""  # name of the whole among the stages


@dataclass(frozen=True)
class ThroughputConfig:
    """Options of a measurement: image and batch sizes, passes, threads."""

    mode: Mode = "throughput"
    image_sizes: tuple[int, ...] = (256,)  # pixels a side that the model works at
    batch_sizes: tuple[int, ...] = (1, 8, 32)  # not used for latency, whose batch is one image
    repeats: int | None = None  # timed passes; None: 5 for throughput, 100 for latency
    warmup: int = 2  # passes before them
    workers: int = 2  # threads that decode
    seed: int = 0  # of the flows' weights, the choice of images and the made-up masks

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, Mode)
        for name, values in (("image size", self.image_sizes), ("batch size", self.batch_sizes)):
            if not values:
                raise ConfigError(f"no {name} is given; give one at least")
            for value in values:
                if value < 1:
                    raise ConfigError(f"the {name} is {value}; it must be at least 1")
        if self.timed_passes < 1 or self.warmup < 0 or self.workers < 1 or self.seed < 0:
            raise ConfigError(
                f"repeats is {self.timed_passes}, warmup {self.warmup}, workers {self.workers} and seed {self.seed}; "
                "give at least 1, 0, 1 and 0"
            )

    @property
    def timed_passes(self) -> int:
        """Number of timed passes of every row."""
        return _REPEATS[self.mode] if self.repeats is None else self.repeats

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Image size and batch size of every row, each pair once, in the order given."""
        batches = self.batch_sizes if self.mode == "throughput" else (1,)
        return [(side, batch) for side in dict.fromkeys(self.image_sizes) for batch in dict.fromkeys(batches)]


class ThroughputMeter:
    """Measurement of rows with one backbone on one device.

    Args:
        backbone: on `device`.
        config: options of the measurement.
        device: where the model runs.
        impl: which implementation of the operations to use, see `fastbgad.ops`.
        matmul_precision: operands of matrix products, see `fastbgad.ops.flow_forward`.
        precision: deprecated name of matmul_precision.

    The flows are new and have the paper's shape: throughput does not depend on what their weights are.

    Raises:
        BackendError: `impl` cannot run on `device`.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: ThroughputConfig,
        device: torch.device,
        *,
        impl: Impl = "auto",
        matmul_precision: MatmulPrecision = "auto",
        precision: MatmulPrecision | None = None,
    ) -> None:
        resolve_impl(impl, torch.empty(0, device=device))
        self.backbone = backbone
        self.config = config
        self.device = device
        self.impl: Impl = impl
        self.matmul_precision: MatmulPrecision = renamed_precision(matmul_precision, precision)
        self.flow: FlowConfig = FlowConfig()
        self.ceilings: Ceilings | None = measure_ceilings(device) if device.type == "cuda" else None

    def row(
        self, image_size: int, batch_size: int, images: BenchImages, on_pass: Callable[[int, int], None] | None = None
    ) -> Row:
        """Measure one row; an error, such as too little memory, is reported in `Row.failed`.

        Args:
            image_size: pixels a side that the model works at.
            batch_size: images that go through the model together; fewer images are repeated.
            images: to read.
            on_pass: called with the number of passes done and of all passes.
        """
        mode, about = self.config.mode, images.describe(image_size, batch_size)
        try:
            stages, total = self._measure(image_size, batch_size, images, on_pass or (lambda done, of: None))
            return Row(image_size, batch_size, mode, about, stages, total, images.skipped)
        except (FastBGADError, MemoryError, RuntimeError) as error:
            reason = _reason(error, self.device)
            if reason is None:
                raise
        # Outside of the handler, because the error's traceback holds every tensor of the row that failed.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return Row(image_size, batch_size, mode, about, skipped=images.skipped, failed=reason)

    def _measure(
        self, image_size: int, batch_size: int, images: BenchImages, on_pass: Callable[[int, int], None]
    ) -> tuple[dict[str, Stage], Stage]:
        config = self.config
        passes = config.warmup + config.timed_passes + _MEMORY_PASSES
        masks = truth_masks(images, image_size, config.seed) if config.mode == "throughput" else None
        numbers = cycle(range(len(images.samples)))
        seconds: dict[str, list[float]] = {}
        with ThreadPoolExecutor(config.workers, thread_name_prefix="fastbgad-bench") as pool:
            model = self._model(image_size, images)
            work = Work(model, pool, images.samples, masks)
            with torch.inference_mode():
                for done in range(config.warmup + config.timed_passes):
                    # Another batch each time, so that the figures represent all images.
                    work.begin(list(islice(numbers, batch_size)))
                    for name, stage in work.stages.items():
                        started = time.perf_counter()
                        stage()
                        self._synchronize()
                        if done >= config.warmup:
                            seconds.setdefault(name, []).append(time.perf_counter() - started)
                    on_pass(done + 1, passes)
                facts = self._facts(work, {name: statistics.median(values) for name, values in seconds.items()})
                peaks = self._peaks(work, list(islice(numbers, batch_size)))
        on_pass(passes, passes)
        return self._summary(batch_size, seconds, peaks, facts)

    def _model(self, image_size: int, images: BenchImages) -> BGAD:
        """Return a model of this size with a calibration, like a trained one."""
        model = BGAD(
            self.backbone,
            (image_size, image_size),
            flow=self.flow,
            seed=self.config.seed,
            impl=self.impl,
            matmul_precision=self.matmul_precision,
        )
        model = model.to(self.device).eval()
        for level in range(len(model.flows)):
            model.flow(level).freeze()
        picture = torch.from_numpy(load_image(images.samples[0], model.image_size))
        batch = picture.permute(2, 0, 1)[None].to(self.device)
        if self.backbone.needs_fit:
            self.backbone.fit([batch])
        loss = LossConfig()
        with torch.inference_mode():
            levels = model(batch)
            model.set_calibration(
                calibrate(levels, model.image_size, beta=loss.beta, tau=loss.tau, normalizer=model.normalizer)
            )
        return model

    def _facts(self, work: Work, medians: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Return channels and rows of every flow, on a GPU also the fractions of its ceilings; call it after a pass."""
        facts: dict[str, dict[str, float]] = {}
        for name, features in zip(flow_names(work.model), work.features, strict=True):
            batch, channels, height, width = features.shape
            facts[name] = {"channels": channels, "rows": height * width}
            if self.ceilings is not None:
                rows = batch * height * width
                flops = flow_flops(rows, channels, self.flow.coupling_layers, self.flow.condition_channels)
                traffic = flow_bytes(rows, channels, features.element_size())
                facts[name]["copy_fraction"] = traffic / medians[name] / self.ceilings.copy_bytes_per_second
                facts[name]["matrix_fraction"] = flops / medians[name] / self.ceilings.matrix_flops_per_second
        if self.ceilings is not None:
            prediction = work.prediction
            tensors = (
                *prediction.log_likelihoods,
                prediction.anomaly_map,
                prediction.decision,
                *prediction.patch_sides,
            )
            traffic = sum(tensor.nbytes for tensor in tensors)
            facts[SCORING] = {"copy_fraction": traffic / medians[SCORING] / self.ceilings.copy_bytes_per_second}
        return facts

    def _peaks(self, work: Work, numbers: list[int]) -> dict[str, int | None]:
        """Return peak bytes of every stage and of the whole; on a GPU of its memory, so None for stages on the CPU."""
        peaks: dict[str, int | None] = {}
        # Objects that are alive now stay alive. Frozen, they are not searched again for every stage, which would take
        # a tenth of a second each time.
        gc.collect()
        gc.freeze()
        try:
            work.begin(numbers)
            for name, stage in work.stages.items():
                peak = peak_bytes(stage, self.device)
                peaks[name] = None if self.device.type == "cuda" and name in (DECODE, METRICS) else peak
            work.begin(numbers)
            peaks[_WHOLE] = peak_bytes(work.run, self.device)
        finally:
            gc.unfreeze()
        return peaks

    def _summary(
        self,
        batch_size: int,
        seconds: Mapping[str, list[float]],
        peaks: Mapping[str, int | None],
        facts: Mapping[str, Mapping[str, float]],
    ) -> tuple[dict[str, Stage], Stage]:
        """Return all stages, and the total."""
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        whole, latency = sum(medians.values()), self.config.mode == "latency"

        def stage(name: str, median: float, values: list[float]) -> Stage:
            peak = peaks[name]
            return Stage(
                ms_per_image=1e3 * median / batch_size,
                share=median / whole,
                peak_mib=None if peak is None else peak / 2**20,
                p99_ms=1e3 * float(np.quantile(values, 0.99)) if latency else None,
                **facts.get(name, {}),  # type: ignore[arg-type]
            )

        stages = {name: stage(name, medians[name], values) for name, values in seconds.items()}
        if UPLOAD not in stages:
            stages = {DECODE: stages.pop(DECODE), UPLOAD: Stage(None), **stages}
        passes = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
        total = stage(_WHOLE, statistics.median(passes) if latency else whole, passes)
        return stages, replace(total, share=1.0)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _reason(error: Exception, device: torch.device) -> str | None:
    """Return the reason why a row failed in one sentence, None for an error that is a bug."""
    if isinstance(error, FastBGADError):
        return str(error)
    text = str(error).strip().partition("\n")[0]
    signs = ("can't allocate memory", "not enough memory", "out of memory")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in text.lower() for sign in signs):
        return f"out of memory on {device} ({text or 'no more said'}); take smaller batches or images"
    return None
