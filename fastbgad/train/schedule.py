"""The schedule: learning rate, order of the images, order of the patches. All of it is a function of the seed.

No random state is carried from one pass to the next, so a resumed run needs only its progress point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..config import ScheduleConfig

# One stream of random numbers per purpose, so that none shifts another.
_IMAGES, _PATCHES = 1, 2


def learning_rate(config: ScheduleConfig, meta_epoch: int, progress: float) -> float:
    """Return the learning rate of the official schedule: a cosine over meta epochs after a linear warm-up from lr / 10.

    The official code counts two loaders where it means their batches, so its warm-up runs unevenly; here it is linear
    in the batches.

    Args:
        config: the schedule.
        meta_epoch: counted from 0.
        progress: the part of this meta epoch already done, 0 <= progress < 1.
    """

    def cosine(epoch: float) -> float:
        floor = config.lr * config.lr_floor
        return floor + (config.lr - floor) * (1 + math.cos(math.pi * epoch / config.meta_epochs)) / 2

    if meta_epoch < config.warmup_epochs:
        start, end = config.lr / 10, cosine(config.warmup_epochs)
        return start + (end - start) * (meta_epoch + progress) / config.warmup_epochs
    return cosine(meta_epoch)


def image_batches(items: Tensor, batch_size: int, seed: int, pass_index: int) -> list[Tensor]:
    """Return the items of a pass in random order, in batches; the last may be smaller."""
    order = torch.randperm(len(items), generator=_generator(seed, _IMAGES, pass_index))
    return list(items[order].split(batch_size))


def patch_chunks(
    slots: Tensor,  # int64 [B]
    area: int,
    chunk_rows: int,
    key: tuple[int, int, int, int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all patches of a batch's images at one level, in random order, as (slot [n], position [n]) chunks.

    The rows are divided evenly into the fewest chunks of at most `chunk_rows`: none is dropped, and no chunk is a
    remainder of a few rows with a noisy gradient.

    Args:
        slots: of the images in the feature store.
        area: patches per image.
        chunk_rows: most patches per chunk.
        key: (seed, pass, batch, level), which alone decides the order.
    """
    seed, *point = key
    rows = len(slots) * area
    order = torch.randperm(rows, generator=_generator(seed, _PATCHES, *point))
    for chunk in torch.tensor_split(order, math.ceil(rows / chunk_rows)):
        yield slots[chunk // area], chunk % area


def patch_rows(
    slots: Tensor,  # int64 [B]
    area: int,
    chunk_rows: int,
    key: tuple[int, int, int, int],
) -> Iterator[Tensor]:
    """Yield the chunks of `patch_chunks` as rows int64 [n] of a feature store, slot * area + position."""
    return (slot * area + position for slot, position in patch_chunks(slots, area, chunk_rows, key))


def _generator(seed: int, *purpose: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, *purpose]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
