"""Image sizes that a network takes, found by trying: it runs on the meta device, which has shapes and no numbers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

# Multiples that sizes are rounded to: the strides of convolutional networks, and the windows of 7 and 8 patches of
# attention at stride 32, half of them, and twice.
_MULTIPLES = (8, 16, 32, 64, 112, 128, 224, 256)

Size = tuple[int, int]
"""Height and width, in pixels."""


class SizeTrial:
    """A copy of a network without memory, to see which image sizes it takes.

    Args:
        net: takes images [B, 3, H, W]. It is not changed, and the copy is not compiled where it is.
    """

    def __init__(self, net: nn.Module) -> None:
        tensors: dict[int, Tensor] = {
            **{id(one): nn.Parameter(one.detach().to("meta"), requires_grad=False) for one in net.parameters()},
            **{id(one): one.detach().to("meta") for one in net.buffers()},
        }
        self._dtype = next((one.dtype for one in tensors.values() if one.is_floating_point()), torch.float32)
        # deepcopy takes the tensors that its memo has already, so that no weight is copied.
        self._net = copy.deepcopy(net, dict[int, Any](tensors))

    @torch.no_grad()
    def works(self, size: Size) -> bool:
        """Return True if the network takes images of this size."""
        # Networks state that a size does not fit in every kind of exception, and nothing here can be out of memory.
        with suppress(Exception):
            self._net(torch.empty((1, 3, *size), dtype=self._dtype, device="meta"))
            return True
        return False

    def near(self, size: Size, usual: Size, smallest: int) -> list[Size]:
        """Return up to two sizes that work: the nearest one that is no larger in either side, and one no smaller.

        Args:
            size: to search around.
            usual: size that the network was made for, which is tried too.
            smallest: least height and width.
        """
        found: list[Size] = []
        for up in (False, True):
            candidates = {candidate for candidate in _rounded(size, usual, up) if min(candidate) >= smallest}
            nearest = sorted(candidates, key=lambda candidate: (_distance(candidate, size), candidate))
            found += itertools.islice(filter(self.works, nearest), 1)
        return found


def _rounded(size: Size, usual: Size, up: bool) -> Iterator[Size]:
    height, width = size
    for rows, columns in (*((multiple, multiple) for multiple in _MULTIPLES), usual):
        if up:
            yield -(-height // rows) * rows, -(-width // columns) * columns
        else:
            yield height // rows * rows, width // columns * columns


def _distance(one: Size, other: Size) -> int:
    return abs(one[0] - other[0]) + abs(one[1] - other[1])
