"""Positional condition as a tensor that still knows where its values come from.

A flow written for FrEIA takes its condition as a tensor [N, 128]. `positional_rows` makes one that is light, because it
holds N positions instead of N x 128 values, and that an accelerated flow recognizes: it then adds two rows of small
tables per patch instead of multiplying 128 more columns. Everything else sees an ordinary tensor.

    where = fastbgad.positional_rows(height, width, index)
    z, log_det = decoder(patches, [where])

Selecting, reordering and moving between devices keep that knowledge, so code around it need not change:

    encoding = positional_map(128, height, width).to(device).unsqueeze(0).repeat(batch, 1, 1, 1)
    rows = encoding.permute(0, 2, 3, 1).reshape(-1, 128)
    decoder(patches, [rows[selection]])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import FeatureError
from .positional import PositionalRows

__all__ = ["PositionalEncoding", "positional_map", "positional_rows", "positions_of", "separable"]


def positional_rows(
    height: int,
    width: int,
    index: Tensor | None = None,
    *,
    channels: int = 128,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> PositionalEncoding:
    """Return the positional condition of N patches of a [height, width] feature map, as a light tensor [N, channels].

    Args:
        height, width: size of the map.
        index: int64 [N], flattened positions y * width + x, on the device where the condition is needed. None means
            the whole map in raster order: N = height * width.
        channels: P, a multiple of 4.
        dtype: of the values, where they are needed as values.
        device: where index is None; the default device if not given.

    Raises:
        FeatureError: an impossible size or type; a position outside the map (checked on the CPU, where that is free).

    Source: the official BGAD and CFLOW-AD; the equations stand in `fastbgad.reference.positional_encoding`.
    """
    PositionalRows(height, width, index, channels)  # checks all but the values
    area = height * width
    if index is None:
        return PositionalEncoding(torch.arange(area, device=device), (height, width, channels), 1, dtype, raster=True)
    if index.device.type == "cpu" and len(index) and not (index.min() >= 0 and index.max() < area):
        raise FeatureError(
            f"positions must lie in [0, {area}) for a map of {height} x {width}, not in "
            f"[{int(index.min())}, {int(index.max())}]"
        )
    return PositionalEncoding(index, (height, width, channels), 1, dtype, raster=False)


def positional_map(channels: int, height: int, width: int, *, dtype: torch.dtype = torch.float32) -> PositionalEncoding:
    """Return the positional condition of a whole map, [channels, height, width], on the CPU, as `positional_rows`."""
    PositionalRows(height, width, None, channels)
    positions = torch.arange(height * width).view(height, width)
    return PositionalEncoding(positions, (height, width, channels), 0, dtype, raster=True)


def positions_of(condition: Tensor) -> PositionalRows | None:
    """Return the positions that an [N, P] condition stands for, or None for an ordinary tensor."""
    if not isinstance(condition, PositionalEncoding):
        return None
    positions = condition.positions()
    if positions is None or positions.dim() != 1 or condition._channel_dim != 1:
        return None
    height, width, channels = condition._map
    whole = condition._raster and len(positions) % (height * width) == 0
    return PositionalRows(height, width, None if whole else positions, channels)


def separable(condition: Tensor) -> PositionalRows | Tensor:
    """Return a condition as a flow takes it: its positions if it knows them, else an ordinary tensor [N, P]."""
    if not isinstance(condition, PositionalEncoding):
        return condition
    return positions_of(condition) or condition.values()


class PositionalEncoding(Tensor):
    """Tensor of positional codes that holds positions, and computes its values when an operation needs them.

    Its positions have its own shape without the channel dimension. The operations in `_STRUCTURE` act on the positions;
    all others, and all writing, act on the values and return an ordinary tensor.
    """

    _positions: Tensor  # int64
    _map: tuple[int, int, int]  # height, width, channels
    _channel_dim: int
    _raster: bool  # the positions, flattened, are whole maps in raster order
    _codes: Tensor | None  # once they were asked for
    _made_version: int  # PyTorch's count of changes of the values when they were made

    @staticmethod
    def __new__(
        cls, positions: Tensor, map_: tuple[int, int, int], channel_dim: int, dtype: torch.dtype, *, raster: bool
    ) -> PositionalEncoding:
        shape = (*positions.shape[:channel_dim], map_[2], *positions.shape[channel_dim:])
        made: PositionalEncoding = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=positions.device)
        made._positions, made._map, made._channel_dim, made._raster = positions, map_, channel_dim, raster
        made._codes, made._made_version = None, 0
        return made

    def positions(self) -> Tensor | None:
        """Return the flattened positions, int64, in this tensor's shape without the channels.

        None if the values have become independent of them: something wrote to them, or they require a gradient.
        """
        if self._codes is None:
            return self._positions
        # A view of the values that something wrote to shares their count of changes.
        ordinary = self._codes._version != self._made_version or self._codes.requires_grad
        return None if ordinary else self._positions

    def _with(self, positions: Tensor, channel_dim: int | None = None, raster: bool = False) -> PositionalEncoding:
        at = self._channel_dim if channel_dim is None else channel_dim
        return PositionalEncoding(positions, self._map, at, self.dtype, raster=raster)

    def values(self) -> Tensor:
        """Return the same as an ordinary tensor."""
        if self._codes is None:
            height, width, channels = self._map
            rows = PositionalRows(height, width, self._positions.reshape(-1), channels)
            with torch.inference_mode(False), torch.no_grad():
                dense = rows.dense(self._positions.numel(), self.dtype, self.device)
            self._codes = dense.view(*self._positions.shape, channels).movedim(-1, self._channel_dim)
            self._made_version = self._codes._version
        return self._codes

    def __repr__(self) -> str:  # type: ignore[override]
        if self.positions() is None:
            return repr(self._codes)
        height, width, _ = self._map
        return f"PositionalEncoding({list(self.shape)}, map={height}x{width}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.positions() is None:
            return self.values().__reduce_ex__(protocol)
        return _rebuild, (self._positions, self._map, self._channel_dim, self.dtype, self._raster)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        ordinary = self.positions() is None
        copy = self.values().clone() if ordinary else self._with(self._positions.clone(), raster=self._raster)
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls) and args[0].positions() is not None:
            if func in _METADATA:
                return super().__torch_function__(func, types, args, kwargs)
            if func in _STRUCTURE:
                found = _STRUCTURE[func](args[0], *args[1:], **kwargs)
                if found is not None:
                    return found
        result = func(*tree_map(_dense, tuple(args)), **tree_map(_dense, kwargs))
        if args and isinstance(args[0], cls) and result is args[0]._codes:
            return args[0]  # x += 1 must leave x this object
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # what reaches PyTorch below its Python interface
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(_dense, tuple(args)), **tree_map(_dense, kwargs or {}))


def _rebuild(
    positions: Tensor, map_: tuple[int, int, int], channel_dim: int, dtype: torch.dtype, raster: bool
) -> PositionalEncoding:
    return PositionalEncoding(positions, map_, channel_dim, dtype, raster=raster)


def _dense(value: Any) -> Any:
    return value.values() if isinstance(value, PositionalEncoding) else value


# Operations that keep the positions; they return None where the values must be used instead.


def _to(x: PositionalEncoding, *args: Any, **kwargs: Any) -> PositionalEncoding | None:
    options = {key: value for key, value in kwargs.items() if key != "memory_format"}
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*map(_dense, args), **options)
    if dtype is not None and not dtype.is_floating_point:
        return None
    positions = x._positions if device is None else x._positions.to(device, non_blocking=non_blocking)
    return PositionalEncoding(positions, x._map, x._channel_dim, dtype or x.dtype, raster=x._raster)


def _cuda(x: PositionalEncoding, device: Any = None, non_blocking: bool = False, **_: Any) -> PositionalEncoding | None:
    return _to(x, "cuda" if device is None else device, non_blocking=non_blocking)


def _cast(dtype: torch.dtype) -> Callable[..., PositionalEncoding | None]:
    return lambda x, **_: _to(x, dtype)


def _same(x: PositionalEncoding, **_: Any) -> PositionalEncoding:
    return x


def _clone(x: PositionalEncoding, **_: Any) -> PositionalEncoding:
    return x._with(x._positions, raster=x._raster)


def _unsqueeze(x: PositionalEncoding, dim: int) -> PositionalEncoding:
    dim = dim % (x.dim() + 1)
    before = dim <= x._channel_dim
    return x._with(x._positions.unsqueeze(dim if before else dim - 1), x._channel_dim + before, x._raster)


def _repeat(x: PositionalEncoding, *sizes: Any) -> PositionalEncoding | None:
    counts = _sizes(sizes)
    extra = len(counts) - x.dim()
    at = x._channel_dim + extra
    if extra < 0 or counts[at] != 1:
        return None
    counts = [*counts[:at], *counts[at + 1 :]]
    # Repeating what leads a map repeats whole maps; of map dimensions there are at most two, the last ones.
    raster = x._raster and all(count == 1 for count in counts[-2:] if len(counts) > 1)
    return x._with(x._positions.repeat(*counts), at, raster)


def _expand(x: PositionalEncoding, *sizes: Any) -> PositionalEncoding | None:
    wanted = _sizes(sizes)
    at = x._channel_dim + len(wanted) - x.dim()
    if at < x._channel_dim or wanted[at] not in (-1, x._map[2]):
        return None
    wanted = [*wanted[:at], *wanted[at + 1 :]]
    return x._with(x._positions.expand(*wanted), at, x._raster and len(wanted) > 2)


def _permute(x: PositionalEncoding, *dims: Any) -> PositionalEncoding:
    order = [dim % x.dim() for dim in _sizes(dims)]
    rest = [dim - (dim > x._channel_dim) for dim in order if dim != x._channel_dim]
    return x._with(x._positions.permute(rest), order.index(x._channel_dim), x._raster and rest == sorted(rest))


def _transpose(x: PositionalEncoding, dim0: int, dim1: int) -> PositionalEncoding:
    order = list(range(x.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(x, order)


def _reshape(x: PositionalEncoding, *sizes: Any) -> PositionalEncoding | None:
    """Keep the positions if the channel dimension is neither split nor merged."""
    wanted = _sizes(sizes)
    if wanted.count(-1) == 1:
        known = -math.prod(wanted)
        if known == 0 or x.numel() % known:
            return None
        wanted = [x.numel() // known if size == -1 else size for size in wanted]
    if math.prod(wanted) != x.numel():
        return None
    before = math.prod(x.shape[: x._channel_dim])
    for at, size in enumerate(wanted):
        if size == x._map[2] and math.prod(wanted[:at]) == before:
            positions = x._positions.reshape([*wanted[:at], *wanted[at + 1 :]])
            return x._with(positions, at, x._raster)
    return None


def _flatten(x: PositionalEncoding, start_dim: int = 0, end_dim: int = -1) -> PositionalEncoding | None:
    start, end = start_dim % x.dim(), end_dim % x.dim()
    return _reshape(x, [*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])


def _getitem(x: PositionalEncoding, key: Any) -> PositionalEncoding | None:
    """Select rows by a slice, an integer tensor or a mask, where the channels come last."""
    if x._channel_dim == 0 or not isinstance(key, slice | Tensor | list):
        return None
    if isinstance(key, Tensor) and key.dim() > x._channel_dim:
        return None
    positions = x._positions[key]
    return x._with(positions, x._channel_dim + positions.dim() - x._positions.dim())


def _index_select(x: PositionalEncoding, dim: int, index: Tensor) -> PositionalEncoding | None:
    dim = dim % x.dim()
    if dim == x._channel_dim:
        return None
    return x._with(x._positions.index_select(dim - (dim > x._channel_dim), index))


def _sizes(sizes: Sequence[Any]) -> list[int]:
    """Return the sizes of x.reshape(2, 3) and of x.reshape((2, 3)) alike."""
    first = sizes[0] if len(sizes) == 1 else None
    return list(first) if isinstance(first, Sequence) else list(sizes)


# Attributes come and go with PyTorch's versions: `names` went with 2.13.
_ATTRIBUTES = (
    "shape dtype device layout ndim is_cuda requires_grad is_leaf grad_fn is_sparse is_quantized is_meta names"
    " itemsize nbytes"
)
_METHODS = (
    "dim size numel nelement ndimension is_floating_point is_complex element_size __len__ __hash__ get_device"
    " is_inference"
)
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split() if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS.split()),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
    torch.is_inference,
}

_STRUCTURE: Mapping[Callable[..., Any], Callable[..., PositionalEncoding | None]] = {
    Tensor.to: _to,
    Tensor.cuda: _cuda,
    Tensor.cpu: lambda x, **_: _to(x, "cpu"),
    Tensor.float: _cast(torch.float32),
    Tensor.double: _cast(torch.float64),
    Tensor.half: _cast(torch.float16),
    Tensor.bfloat16: _cast(torch.bfloat16),
    Tensor.contiguous: _same,
    Tensor.detach: _same,
    torch.detach: _same,
    Tensor.clone: _clone,
    torch.clone: _clone,
    Tensor.unsqueeze: _unsqueeze,
    torch.unsqueeze: _unsqueeze,
    Tensor.repeat: _repeat,
    Tensor.expand: _expand,
    Tensor.permute: _permute,
    torch.permute: _permute,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    Tensor.view: _reshape,
    Tensor.flatten: _flatten,
    torch.flatten: _flatten,
    Tensor.__getitem__: _getitem,
    Tensor.index_select: _index_select,
    torch.index_select: _index_select,
}
