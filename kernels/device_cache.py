"""Cache of tensors on a device for later calls, on any stream and in any CUDA graph.

A cached tensor outlives the call that made it, so it needs care that the tensors of one call do not:

- **Another stream may read it before it is filled.** The host waits once, when an entry is made; from then on every
  stream may read it. An event would avoid that wait, but a capture could not wait for it: captured work must not depend
  on work outside (cudaErrorStreamCaptureIsolation).
- **It may be freed while another stream still reads it.** The allocator would return its memory at once to the stream
  that it was allocated on. Every other stream that an entry is returned to is therefore recorded with it.
- **A CUDA graph reads it at every replay** through the address that was captured. The cache is not told when a graph is
  deleted, so a value that it returns during a capture is never freed while the cache lives.
- **A tensor that is made during a capture is not filled yet.** It is memory of the graph, filled by each replay and not
  before the first. It serves the captured call alone and is not cached.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def capturing(device: torch.device) -> bool:
    """Return whether work for this device is being captured as a CUDA graph by the calling thread."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Entry(Generic[Made]):
    """A value, the state it was made of, and the streams that it has been returned to."""

    def __init__(self, value: Made, state: Hashable, stream: Any) -> None:
        self.value, self.state, self.streams = value, state, {stream}

    def use_on(self, stream: Any) -> None:
        """Record a stream with the value's tensors."""
        if stream not in self.streams:
            self.streams.add(stream)
            for tensor in tensors_in(self.value):
                tensor.record_stream(stream)


class DeviceCache(Generic[Made]):
    """Cache of tensors, or of tuples and lists of them, by key; the oldest entries are dropped first.

    Args:
        most: largest number of entries, besides those that captured graphs read; None for no limit.

    A graph that was captured with an entry must not outlive the cache, as it must not outlive a module's parameters.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._entries: dict[Hashable, _Entry[Made]] = {}
        self._captured: dict[int, Made] = {}

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Made], state: Hashable = None) -> Made:
        """Return the value of a key; call `make` if there is none or if it was made of another state.

        Args:
            key: everything constant that the value depends on.
            device: the device of its tensors; after a `make` the host waits for the current stream there.
            make: called at most once. During a capture it must not copy from the host.
            state: everything that the value depends on and that changes, such as weights.
        """
        if torch.compiler.is_compiling():
            return make()  # tensors of a trace must not be kept for later calls
        in_capture = capturing(device)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.state != state:
                value = make()
                if in_capture:
                    return value
                if stream is not None:
                    stream.synchronize()
                self._insert(key, _Entry(value, state, stream))
                return value
            if in_capture:
                self._captured[id(entry.value)] = entry.value
            else:
                entry.use_on(stream)
            return entry.value

    def _insert(self, key: Hashable, entry: _Entry[Made]) -> None:
        self._entries.pop(key, None)
        while self._most is not None and len(self._entries) >= self._most:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = entry

    def values(self) -> list[Made]:
        """Return the cached values, the oldest first."""
        return [entry.value for entry in self._entries.values()]

    def clear(self) -> None:
        """Drop all values but those that captured graphs read."""
        with self._lock:
            self._entries.clear()

    def __reduce__(self) -> tuple[type[DeviceCache[Made]], tuple[int | None]]:
        """Make copies and pickles start empty: the values belong to this process and to these tensors."""
        return DeviceCache, (self._most,)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
