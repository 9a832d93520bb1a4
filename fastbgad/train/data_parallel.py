"""One training run shared by several processes: each holds some of the images, a step is taken on the rows of all.

Every image belongs to one process, which extracts its features and computes the flow of its patches. A loss needs only
one number per row, its log-likelihood: these are gathered, so that every process computes the loss of all rows
(boundary, violating rows, means) exactly as one process would, and propagates the gradient of its own rows.
Gradients of weights are added up by DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError
from ..system.ranks import Rank
from ..system.transfers import to_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextmanager
def process_group(rank: Rank, device: torch.device) -> Iterator[DataParallel | None]:
    """Yield the group of processes that torchrun started with this one; None for one alone.

    Raises:
        ConfigError: they were started by another launcher, which does not tell them how to connect.
    """
    if rank.world == 1:
        yield None
        return
    if rank.launcher != "torchrun":
        raise ConfigError(
            f"{rank.launcher} started {rank.world} processes; to share a training, start them with torchrun "
            "(`srun torchrun --nnodes N --nproc-per-node G -m fastbgad train ...`, one task per machine)"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield DataParallel()
    finally:
        dist.destroy_process_group()


class SharedRows(NamedTuple):
    """A chunk of n rows of which this process holds some."""

    rows: Tensor  # int64 [held], rows of this process's store
    order: Tensor  # int64 [n]: row i of the chunk is entry order[i] of the rows that all processes gather
    most: int  # the most rows that any process holds


class DataParallel:
    """The processes of a group, seen from one of them.

    Args:
        group: None for all processes.

    Raises:
        ConfigError: no process group has been made, or this process does not belong to it.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError("data-parallel training needs a process group: call torch.distributed.init_process_group")
        self.group: dist.ProcessGroup | None = group if group is not None else dist.group.WORLD
        self.rank: int = dist.get_rank(self.group)
        self.world: int = dist.get_world_size(self.group)
        if self.rank < 0:
            raise ConfigError("this process is not a member of the group that trains")

    def owned(self, items: Sequence[int]) -> list[int]:
        """Return those of these images, given by their numbers, that belong to this process."""
        return [item for item in items if item % self.world == self.rank]

    def share(self, items: Tensor, positions: Tensor, slots: Tensor, area: int) -> SharedRows:
        """Divide a chunk of patches, given by image [n] and position [n], among the processes.

        Args:
            items: numbers of the images.
            positions: of the patches within their image.
            slots: int64 [images], the slot of each image in this process's store.
            area: patches per image.
        """
        owner = items % self.world
        counts = torch.bincount(owner, minlength=self.world)
        most = max(int(counts.max()), 1)
        order = torch.empty_like(items)
        for rank in range(self.world):
            order[owner == rank] = rank * most + torch.arange(int(counts[rank]))
        held = owner == self.rank
        return SharedRows(slots[items[held]] * area + positions[held], order, most)

    def wrap(self, flow: nn.Module) -> nn.Module:
        """Return the flow with gradients averaged over the processes after each backward."""
        on_gpu = next(flow.parameters()).device.type == "cuda"
        devices = [next(flow.parameters()).device] if on_gpu else None
        return DistributedDataParallel(flow, device_ids=devices, process_group=self.group)

    def gather_rows(self, lp: Tensor, anomalous: Tensor, shared: SharedRows) -> tuple[Tensor, Tensor]:
        """Return lp [n] and labels [n] of the whole chunk, in its order, from this process's own rows.

        The gradient of the result reaches only this process's rows, multiplied by the number of processes, since
        DistributedDataParallel averages the gradients of weights where their sum is needed.
        """
        order = to_device(shared.order, lp.device)
        labels = self._gather(anomalous.to(torch.uint8), shared.most)[order].bool()
        return _GatherRows.apply(lp, self, order, shared.most), labels

    def gather_images(self, values: Tensor, count: int) -> Tensor:
        """Return the values [count, ...] of all images in order, given those of this process's own images in order."""
        most = -(-count // self.world)
        gathered = self._gather(values, most).view(self.world, most, *values.shape[1:])
        # Image i is number i // world of process i % world.
        return gathered.transpose(0, 1).reshape(self.world * most, *values.shape[1:])[:count]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return True if the flag is set in any process."""
        return bool(self.sum(torch.tensor(int(flag), device=device)))

    def _gather(self, values: Tensor, most: int) -> Tensor:
        """Return the values of all processes one after the other, each filled up to `most` rows."""
        padded = values.new_zeros(most, *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lp: Tensor, parallel: DataParallel, order: Tensor, most: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.held = slice(parallel.rank * most, parallel.rank * most + len(lp))
        ctx.size, ctx.world = parallel.world * most, parallel.world
        return parallel._gather(lp.detach(), most)[order]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        gradient = upstream[0].new_zeros(ctx.size)
        gradient[order] = upstream[0] * ctx.world
        return gradient[ctx.held], None, None, None
