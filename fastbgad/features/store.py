"""Features of frozen backbones, extracted once and stored.

Normal images and known anomalies are not augmented and the backbone does not change, so their features need to be
computed only once: 1.2 MB per 256-pixel image with tf_efficientnet_b6 in float32. The store keeps them in memory
where they fit, else in a memory-mapped file.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate

from ..backbones import Backbone
from ..config import CellLabels
from ..errors import ConfigError, FeatureError, OutputError, check_choice
from ..system.files import make_folder
from ..system.transfers import select_to_device

Placement = Literal["auto", "device", "pinned", "memory", "disk"]


@dataclass(frozen=True)
class StoreOptions:
    """Options of a `FeatureStore`.

    Attributes:
        device: the device that trains.
        placement: "device", "pinned" (page-locked host memory, for a GPU), "memory", "disk" (a memory-mapped file),
            or "auto": the first of these that has ample space for the features.
        folder: for the file of "disk", which is removed with the store.
        dtype: of the stored features; None is float16 on a GPU and float32 on a CPU.
        cell_labels: the patches of a level that are anomalous, see `cell_mask`.
    """

    device: torch.device | str = "cpu"
    placement: Placement = "auto"
    folder: str | Path | None = None
    dtype: torch.dtype | None = None
    cell_labels: CellLabels = "nearest"


class FeatureStore:
    """Features and masks of a fixed number of images ("slots"), by level.

    Args:
        backbone: decides the levels.
        image_size: (height, width) in pixels.
        slots: number of images.
        options: device, placement and types.
    """

    def __init__(
        self,
        backbone: Backbone,
        image_size: tuple[int, int],
        slots: int,
        options: StoreOptions | None = None,
    ) -> None:
        options = options or StoreOptions()
        self.device: torch.device = torch.device(options.device)
        self.slots = slots
        self.cell_labels: CellLabels = options.cell_labels
        self.dtype: torch.dtype = options.dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.shapes: list[tuple[int, int, int]] = backbone_shapes(backbone, image_size, self.device)
        sizes = [slots * height * width * channels for channels, height, width in self.shapes]
        self.bytes: int = sum(sizes) * self.dtype.itemsize
        self.placement = _choose_placement(options.placement, self.bytes, self.device)
        self._file: Path | None = None
        flat = self._allocate(sum(sizes), options.folder)
        self.levels: list[Tensor] = [
            part.view(slots, height * width, channels)
            for part, (channels, height, width) in zip(flat.split(sizes), self.shapes, strict=True)
        ]
        self.masks: list[Tensor] = [
            torch.zeros(slots, height * width, dtype=torch.bool, device=self.home) for _, height, width in self.shapes
        ]

    @property
    def home(self) -> torch.device:
        """The device that holds the features."""
        return self.device if self.placement == "device" else torch.device("cpu")

    def _allocate(self, count: int, folder: str | Path | None) -> Tensor:
        if self.placement == "disk":
            parent = make_folder(folder) if folder is not None else Path(tempfile.gettempdir())
            try:
                handle, name = tempfile.mkstemp(prefix=".features.", suffix=".bin", dir=parent)
                self._file = Path(name)
                size = count * self.dtype.itemsize
                try:
                    # Reserves the blocks now: writing to a hole of a full disk through a map would kill the process.
                    os.posix_fallocate(handle, 0, max(1, size))
                    # Not torch.from_file, which opens only names that are UTF-8.
                    mapped = mmap.mmap(handle, max(1, size))
                finally:
                    os.close(handle)
            except OSError as error:
                self.close()
                raise OutputError(
                    f"cannot reserve {self.bytes / 2**30:.1f} GiB for features in {parent}: {error.strerror}; "
                    "free some space or choose another folder"
                ) from error
            return torch.frombuffer(mapped, dtype=torch.uint8)[:size].view(self.dtype)
        pinned = self.placement == "pinned"
        return torch.empty(count, dtype=self.dtype, device=self.home, pin_memory=pinned)

    def close(self) -> None:
        """Remove the memory-mapped file, if there is one."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None

    def put(
        self,
        slots: Sequence[int],
        features: Sequence[Tensor],  # per level [B, C, h, w]
        masks: Tensor,  # [B, H, W] bool
    ) -> None:
        """Fill slots; raise `FeatureError` for features that are not finite (a flow would spread them silently)."""
        index = torch.as_tensor(slots, device=self.home)
        for level, (channels, height, width) in enumerate(self.shapes):
            rows = features[level].permute(0, 2, 3, 1).reshape(-1, height * width, channels)
            if not bool(torch.isfinite(rows).all()):
                raise FeatureError(
                    f"features of level {level} contain NaN or Inf; check the backbone's weights and precision"
                )
            self.levels[level].index_copy_(0, index, rows.to(self.home, self.dtype))
            small = cell_mask(masks, (height, width), self.cell_labels)
            self.masks[level].index_copy_(0, index, small.reshape(-1, height * width).to(self.home))

    def change(self, slots: Sequence[int], function: Callable[[int, Tensor], Tensor]) -> None:
        """Replace the features of some slots by `function(level, maps)`, for maps [1, C, h, w] of each in turn."""
        for level in range(len(self.shapes)):
            for slot in slots:
                maps = function(level, self.maps(level, [slot]))
                self.levels[level][slot].copy_(maps[0].permute(1, 2, 0).flatten(0, 1))

    def copy_from(self, other: FeatureStore, slots: int) -> None:
        """Take over the first slots of a store of the same backbone and image size."""
        for mine, theirs in zip((*self.levels, *self.masks), (*other.levels, *other.masks), strict=True):
            mine[:slots].copy_(theirs[:slots])

    def patches(self, level: int) -> Tensor | None:
        """Return all patches of a level, [slots * h * w, C], if they are on the training device, else None.

        The flow gathers rows from them by itself: `flow(patches, ..., rows=rows)`, with row = slot * h * w + position.
        """
        return self.levels[level].flatten(0, 1) if self.home == self.device else None

    def gather(self, level: int, rows: Tensor) -> Tensor:
        """Return the features [n, C] of rows, on the training device."""
        return select_to_device(self.levels[level].flatten(0, 1), rows, self.device)

    def labels(self, level: int, rows: Tensor) -> Tensor:
        """Return the labels of rows, bool [n], on the training device."""
        return select_to_device(self.masks[level].flatten(), rows, self.device)

    def maps(self, level: int, slots: Sequence[int]) -> Tensor:
        """Return the features of some images as [n, C, h, w], on the training device."""
        channels, height, width = self.shapes[level]
        rows = self.levels[level].index_select(0, torch.as_tensor(slots, device=self.home)).to(self.device)
        return rows.view(-1, height, width, channels).permute(0, 3, 1, 2)


def cell_mask(
    masks: Tensor,  # [B, H, W] bool
    size: tuple[int, int],
    labels: CellLabels,
) -> Tensor:
    """Return the masks at a level's size, bool [B, h, w]: by the nearest pixel, or by any pixel of the patch.

    Nearest is what the official code does. A scratch two pixels wide then labels few of the stride-16 patches that
    show it, and the others train as normal; "any" labels them all.
    """
    values = masks[:, None].float()
    small = interpolate(values, size=size, mode="nearest") if labels == "nearest" else adaptive_max_pool2d(values, size)
    return small[:, 0] > 0.5


def backbone_shapes(
    backbone: Backbone, image_size: tuple[int, int], device: torch.device
) -> list[tuple[int, int, int]]:
    """Return (channels, height, width) of every level, from running one mid-gray image."""
    gray = torch.full((1, 3, *image_size), 128, dtype=torch.uint8, device=device)
    with torch.no_grad():
        return [(f.shape[1], f.shape[2], f.shape[3]) for f in backbone.extract(gray)]


@torch.inference_mode()
def extract_into(
    store: FeatureStore,
    backbone: Backbone,
    batches: Iterable[tuple[Sequence[int], Tensor, Tensor]],  # slots, images [B, 3, H, W], masks [B, H, W]
    on_images: Callable[[int], None] | None = None,
) -> None:
    """Run the backbone over batches and store its features; call `on_images(n)` after every batch of n."""
    for slots, images, masks in batches:
        store.put(slots, backbone(images.to(store.device)), masks)
        if on_images is not None:
            on_images(len(slots))


def _choose_placement(placement: Placement, size: int, device: torch.device) -> Placement:
    check_choice("placement", placement, Placement)
    if placement == "pinned" and device.type != "cuda":
        raise ConfigError("placement 'pinned' is for training on a GPU; use 'memory' or 'auto' on a CPU")
    if placement != "auto":
        return "memory" if placement == "device" and device.type == "cpu" else placement
    # Half of the free memory is left to activations, the optimizer and other programs.
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if size < free / 2:
            return "device"
    if size < _available_memory() / 2:
        return "pinned" if device.type == "cuda" else "memory"
    return "disk"


def _available_memory() -> float:
    """Return the bytes of host memory that are available without swapping; infinite where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * float(line.split()[1])
    except OSError:
        pass
    return math.inf
