"""Training of one level: its flow, its optimizer, its stream and its step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..features.store import FeatureStore
from ..model.flow import ConditionalFlow
from ..ops import PositionalRows
from ..system.transfers import to_device
from .data_parallel import DataParallel, SharedRows
from .graph import CapturedSteps
from .loss_record import COLUMNS, loss_row
from .losses import training_loss


class LevelTrainer:
    """Trains the flow of one level, chunk of patches after chunk.

    Levels share nothing, so each has its own optimizer and, on a GPU, its own stream: they are trained side by side.
    On a GPU a step is captured as a CUDA graph once it has run a few times, and replayed from then on. Nothing here
    waits for the device.

    Args:
        level: counted from 0.
        flow: trained in place.
        store: features and masks of the images.
        config: method, losses, schedule.
        parallel: the processes that share each step, if there are several.
    """

    def __init__(
        self,
        level: int,
        flow: ConditionalFlow,
        store: FeatureStore,
        config: TrainConfig,
        parallel: DataParallel | None = None,
    ) -> None:
        self.level: int = level
        self.flow: ConditionalFlow = flow
        self.store: FeatureStore = store
        self.config: TrainConfig = config
        self.parallel: DataParallel | None = parallel
        self.channels: int
        self.height: int
        self.width: int
        self.channels, self.height, self.width = store.shapes[level]
        self.device: torch.device = store.device
        on_gpu = self.device.type == "cuda"
        self.stream: torch.cuda.Stream | None = torch.cuda.Stream(self.device) if on_gpu else None
        self.parameters: list[nn.Parameter] = [p for p in flow.parameters() if p.requires_grad]
        # A captured step reads its learning rate from the device.
        self.lr: Tensor | float = torch.tensor(config.schedule.lr, device=self.device) if on_gpu else config.schedule.lr
        self.optimizer: torch.optim.Adam = torch.optim.Adam(self.parameters, lr=self.lr, fused=True, capturable=on_gpu)
        self.sums: Tensor = torch.zeros(COLUMNS, dtype=torch.float64, device=self.device)
        self.module: nn.Module = flow
        if parallel is not None:
            # DistributedDataParallel makes nodes that accumulate and exchange gradients, and they keep the stream that
            # they were made on. On a stream that levels share, all levels would wait for each other.
            self.begin()
            with self.on_stream():
                self.module = parallel.wrap(flow)
            self.end()
        # A step in which processes exchange gradients is not captured.
        captured = on_gpu and parallel is None and store.patches(level) is not None
        self.steps: CapturedSteps | None = CapturedSteps(self._step) if captured else None

    @property
    def area(self) -> int:
        """Patches per image."""
        return self.height * self.width

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        if isinstance(self.lr, Tensor):
            with self.on_stream():
                self.lr.fill_(lr)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr

    def train(self, chunks: Iterator[Tensor] | Iterator[SharedRows], first_phase: bool) -> None:
        """Take an optimizer step on every chunk of rows of the store."""
        with self.on_stream():
            for chunk in chunks:
                rows = chunk if isinstance(chunk, Tensor) else chunk.rows
                rows = to_device(rows, self.store.home)
                if self.steps is not None:
                    self.steps(rows, first_phase)
                else:
                    self._step(rows, first_phase, None if isinstance(chunk, Tensor) else chunk)

    def coast(self, steps: int) -> None:
        """Take steps without a gradient, as torch 1.x did while other levels trained; none before the first gradient.

        Adam then moves on by its momentum.
        """
        if steps == 0 or not self.optimizer.state:
            return
        with self.on_stream():
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
            for _ in range(steps):
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _step(self, rows: Tensor, first_phase: bool, shared: SharedRows | None = None) -> None:
        """Take one optimizer step on rows [n] of the store."""
        anomalous = self.store.labels(self.level, rows)
        lp = self._log_likelihood(rows)
        if shared is not None:
            assert self.parallel is not None
            lp, anomalous = self.parallel.gather_rows(lp, anomalous, shared)
        loss = training_loss(
            lp, anomalous, self.channels, self.config.method, self.config.loss, first_phase=first_phase
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        self.optimizer.step()
        self.sums += loss_row(loss)

    def _log_likelihood(self, rows: Tensor) -> Tensor:
        """Return lp [n] of rows. The flow gathers them by itself where the store is on its device."""
        channels, patches = self.flow.spec.condition_channels, self.store.patches(self.level)
        if patches is not None:
            condition = PositionalRows(self.height, self.width, channels=channels) if channels else None
            return self.module(patches, condition, rows=rows).log_likelihood
        position = to_device(rows % self.area, self.device)
        condition = PositionalRows(self.height, self.width, position, channels) if channels else None
        return self.module(self.store.gather(self.level, rows), condition).log_likelihood

    def on_stream(self) -> AbstractContextManager[object]:
        """Return a context in which work for the device goes to this level's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def begin(self) -> None:
        """Make this level's stream wait for the work queued on the current stream."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def end(self) -> None:
        """Make the current stream wait for the work queued on this level's stream."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
