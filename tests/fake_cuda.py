"""Stand-ins for PyTorch's CUDA streams and graphs that write down in which order they are asked for what.

Tensors stay on the CPU; code that is given the device `GPU` believes to work for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

GPU = torch.device("cuda:0")


class FakeStream:
    """A stream that notes in `FakeCuda.log` what it waits for and what waits for it."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def synchronize(self) -> None:
        self.cuda.log.append(("synchronize", self.name))

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(("wait", self.name, other.name))

    def record_event(self) -> str:
        self.cuda.log.append(("event", self.name))
        return f"event on {self.name}"

    def wait_event(self, event: str) -> None:
        self.cuda.log.append(("wait", self.name, event))


class FakeGraph:
    """A graph that replays the function that the captured code leaves in `replayed`."""

    def __init__(self) -> None:
        self.replayed: Callable[[], None] = lambda: None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.replayed()


class FakeCuda:
    """What the stand-ins know: streams, the capture that is under way, and the log of all of them."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.streams = [FakeStream(self, "default")]
        self.current = self.streams[0]
        self.graph: FakeGraph | None = None  # that is being captured
        self.graphs: list[FakeGraph] = []

    def new_stream(self, device: object = None) -> FakeStream:
        self.streams.append(FakeStream(self, f"stream {len(self.streams)}"))
        return self.streams[-1]

    def new_graph(self) -> FakeGraph:
        self.graphs.append(FakeGraph())
        return self.graphs[-1]

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def capture(self, graph: FakeGraph | None = None, **options: Any) -> Iterator[None]:
        self.graph = graph or FakeGraph()
        try:
            yield
        finally:
            self.graph = None


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The stand-ins in place of torch.cuda's own; tensors note when they are pinned, copied and recorded."""
    fake = FakeCuda()

    def record_stream(tensor: Tensor, stream: FakeStream) -> None:
        fake.log.append(("record", tensor.data_ptr(), stream.name))

    def pin_memory(tensor: Tensor) -> Tensor:
        fake.log.append(("pin", tensor.data_ptr()))
        return tensor

    def to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if GPU not in args:
            return ordinary_to(tensor, *args, **options)
        fake.log.append(("copy", tensor.data_ptr(), options.get("non_blocking", False), fake.current.name))
        return tensor

    def without_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> Tensor:
            tensor = make(*args, device=None if device == GPU else device, **options)
            if pin_memory:
                fake.log.append(("pin", tensor.data_ptr()))
            return tensor

        return made

    ordinary_to = Tensor.to
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", fake.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.current)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.new_graph)
    monkeypatch.setattr(torch.cuda, "graph", fake.capture)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.graph is not None)
    monkeypatch.setattr(Tensor, "record_stream", record_stream)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    for name in ("tensor", "zeros", "empty"):
        monkeypatch.setattr(torch, name, without_device(getattr(torch, name)))
    return fake


@pytest.fixture
def captures_on_cpu(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The same, where a capture also concerns tensors of the CPU: it is what code with a device of its own sees."""
    from fastbgad.kernels import device_cache
    from fastbgad.kernels.flow import pack as flow_pack
    from fastbgad.ops import positional

    for module in (device_cache, flow_pack, positional):
        monkeypatch.setattr(module, "capturing", lambda device: fake_cuda.graph is not None)
    return fake_cuda
