"""Synthesized anomalies, made by threads while training uses those made before.

The images of the next generation are made while the current one is trained on. On a GPU their features are extracted
in the background as well, on a stream of their own, into the slots that the current generation does not use; on a CPU
that would only take cores away from training, so it is done when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..data import AugmentedAnomalies, LoadedSample
from ..features.image_features import ImageFeatures
from ..features.store import extract_into

SLOT_SETS = 2
"""Sets of slots that take turns: one is trained on while the other is filled."""


class SynthesisAhead:
    """The synthesized anomalies of a run, generation after generation.

    Args:
        anomalies: the plan of the anomalies.
        indices: of its items that this process synthesizes.
        features: their features go into `SLOT_SETS` sets of its spare slots.
        generations: their number.
        workers: threads that make images.
    """

    def __init__(
        self,
        anomalies: AugmentedAnomalies,
        indices: Sequence[int],
        features: ImageFeatures,
        generations: int,
        workers: int,
    ) -> None:
        self.anomalies: AugmentedAnomalies = anomalies
        self.indices: Sequence[int] = indices
        self.features: ImageFeatures = features
        self.generations: int = generations
        self._makers = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="fastbgad-synthesis")
        self._extractor = ThreadPoolExecutor(1, thread_name_prefix="fastbgad-extraction")
        self._in_background = features.device.type == "cuda"
        # One for all generations: PyTorch hands out 32 streams in turn, so a new one for each would soon be that of a
        # level, and could get work while a step is captured on it.
        self._stream = torch.cuda.Stream(features.device) if self._in_background else None
        self._images: dict[int, list[Future[LoadedSample]]] = {}
        self._extracted: dict[int, Future[None]] = {}
        self._latest = -1  # the generation whose slots were returned last

    def slots(self, generation: int) -> list[int]:
        """Return the slots of a generation's features, in the order of `indices`."""
        first = self.features.spare.start + generation % SLOT_SETS * len(self.indices)
        return list(range(first, first + len(self.indices)))

    def take(self, generation: int) -> list[int]:
        """Wait until a generation's features are stored and return their slots; start making the next generation.

        Raises:
            DataError: an anomaly that cannot be pasted. FeatureError: features that are not finite.
        """
        if not self.indices:
            return []
        if generation != self._latest:
            if self._in_background:
                self._start(generation).result()
            else:
                self._extract(generation)
            self._forget(generation)
            self._latest = generation
            if generation + 1 < self.generations:
                if self._in_background:
                    self._start(generation + 1)
                else:
                    self._make(generation + 1)
        return self.slots(generation)

    def close(self) -> None:
        """Stop the threads; images that are being made are waited for, others are not begun."""
        for pool in (self._makers, self._extractor):
            pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, generation: int) -> list[Future[LoadedSample]]:
        if generation not in self._images:
            self._images[generation] = [self._makers.submit(self.anomalies.get, generation, i) for i in self.indices]
        return self._images[generation]

    def _start(self, generation: int) -> Future[None]:
        if generation not in self._extracted:
            self._make(generation)
            # Work that still fills the store, or reads the slots that are filled next, was queued before this moment.
            before = torch.cuda.current_stream(self.features.device).record_event()
            self._extracted[generation] = self._extractor.submit(self._extract_aside, generation, before)
        return self._extracted[generation]

    def _extract_aside(self, generation: int, before: torch.cuda.Event) -> None:
        """Run `_extract` in the background, on its own stream; return when the features are stored."""
        assert self._stream is not None
        try:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(before)
                self._extract(generation)
        finally:
            # This thread may wait, so that no other has to, neither for the features nor before the store is freed.
            self._stream.synchronize()

    def _extract(self, generation: int) -> None:
        slots, size = self.slots(generation), self.features.batch_size
        images = self._make(generation)

        def batches() -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
            for start in range(0, len(slots), size):
                made = [future.result() for future in images[start : start + size]]
                masks = torch.stack([sample.mask for sample in made])
                yield slots[start : start + size], torch.stack([sample.image for sample in made]), masks

        extract_into(self.features.store, self.features.backbone, batches())

    def _forget(self, generation: int) -> None:
        self._images.pop(generation, None)
        self._extracted.pop(generation, None)
