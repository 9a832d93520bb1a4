"""Cached tensors: complete before another stream or a graph reads them, and there for as long as a graph reads them."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastbgad.flow_spec import FlowSpec
from fastbgad.kernels.device_cache import DeviceCache, tensors_in
from fastbgad.kernels.flow.pack import addresses
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import PositionalRows
from fastbgad.ops.flow import kernel_weights
from fastbgad.ops.flow.prepared_weights import MOST_ENTRIES
from fastbgad.ops.positional import _make_axis_code, axis_code
from fastbgad.train.graph import WARM_UP_STEPS, CapturedSteps
from tests.fake_cuda import GPU, FakeCuda, captures_on_cpu, fake_cuda
from tests.flows import lively_flow

__all__ = ["captures_on_cpu", "fake_cuda"]
CPU = torch.device("cpu")


def test_is_complete_before_it_is_handed_out(fake_cuda: FakeCuda) -> None:
    """The maker's stream is waited for once; then neither other streams nor captures have anything to wait for."""
    cache, side = DeviceCache[Tensor](4), fake_cuda.new_stream()

    def make() -> Tensor:
        fake_cuda.log.append(("make",))
        return torch.ones(2)

    with fake_cuda.on(side):
        first = cache.get("key", GPU, make)
    assert fake_cuda.log == [("make",), ("synchronize", side.name)]
    with fake_cuda.capture():
        assert cache.get("key", GPU, make) is first
    assert cache.get("key", GPU, make) is first
    assert [entry[0] for entry in fake_cuda.log] == ["make", "synchronize", "record"]


def test_codes_of_a_map_are_complete(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made by several kernels of one stream, and read by every level on its own."""
    monkeypatch.setattr(kernel_weights, "_stack_codes", lambda *key: torch.ones(3))
    kernel_weights.stacked_codes(501, 3, 8, GPU)
    assert fake_cuda.log == [("synchronize", "default")]


def test_other_streams_are_recorded_once(fake_cuda: FakeCuda) -> None:
    """So that memory which is dropped here is not given away while they still read it."""
    cache, side = DeviceCache[tuple[list[Tensor], str]](1), fake_cuda.new_stream()
    kept = cache.get("key", GPU, lambda: ([torch.ones(2), torch.ones(3)], "more"))
    fake_cuda.log.clear()
    for _ in range(2):
        cache.get("key", GPU, list)
        with fake_cuda.on(side):
            cache.get("key", GPU, list)
    assert fake_cuda.log == [("record", tensor.data_ptr(), side.name) for tensor in kept[0]]


def test_limit_state_and_copies() -> None:
    cache = DeviceCache[int](2)
    assert [cache.get(key, CPU, lambda key=key: key) for key in (1, 2, 1, 3)] == [1, 2, 1, 3]
    assert cache.values() == [2, 3]
    assert cache.get(2, CPU, lambda: 20, state="changed") == 20
    assert cache.values() == [3, 20]
    assert copy.deepcopy(cache).values() == []
    cache.clear()
    assert cache.values() == []


def test_what_a_capture_makes_is_not_kept(captures_on_cpu: FakeCuda) -> None:
    """Until the graph is replayed there is nothing in it."""
    cache = DeviceCache[Tensor](2)
    with captures_on_cpu.capture():
        assert cache.get("key", CPU, lambda: torch.ones(1)) == 1
    assert cache.values() == []
    before = cache.get("key", CPU, lambda: torch.ones(1), state=0)
    with captures_on_cpu.capture():
        assert cache.get("key", CPU, lambda: torch.zeros(1), state=1) == 0
    assert cache.values() == [before]


def test_captured_steps_read_tables_that_stay(captures_on_cpu: FakeCuda) -> None:
    """However many flows and map sizes come after the capture, and even if the caches are emptied."""
    tables: list[weakref.ref[Tensor]] = []
    pointers = tuple(range(7))

    def step(rows: Tensor, first_phase: bool) -> None:
        tables[:] = map(weakref.ref, (addresses(pointers, CPU), kernel_weights.stacked_codes(31, 33, 8, CPU)))
        tables.extend(map(weakref.ref, PositionalRows(137, 139, channels=8).codes(torch.float32, CPU)))

    captured = CapturedSteps(step)
    for _ in range(WARM_UP_STEPS + 1):
        captured(torch.arange(3), False)
    assert len(captures_on_cpu.graphs) == 1
    for i in range(300):
        addresses((i, i), CPU)
    for i in range(1, 70):
        kernel_weights.stacked_codes(i, 1, 8, CPU)
        axis_code(i, 4, torch.float32, CPU)
    gc.collect()
    assert [table() is not None for table in tables] == [True] * 4
    expected = torch.tensor(pointers), kernel_weights._stack_codes(31, 33, 8, CPU)
    assert all(torch.equal(table(), value) for table, value in zip(tables, expected, strict=False))


def test_eager_tables_are_dropped() -> None:
    """Entries that no graph reads do not pile up."""
    table = weakref.ref(addresses((1, 2, 3), CPU))
    for i in range(300):
        addresses((i, i, i), CPU)
    gc.collect()
    assert table() is None


class DevicesOfResults(TorchDispatchMode):
    """Notes on which devices the operations leave their results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {tensor.device.type for tensor in tensors_in(result)}
        return result


def test_tables_without_a_warm_up(captures_on_cpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture cannot copy from the host: the addresses are constants of kernels, the sines the device's own."""
    pointers, meta = (2**40 + 1, 2**56 + 3, 7), torch.device("meta")
    expected = torch.tensor(pointers)
    # It makes its tensor on the host.
    monkeypatch.setattr(torch, "tensor", None)
    with captures_on_cpu.capture():
        assert torch.equal(addresses(pointers, CPU), expected)
        assert torch.equal(axis_code(19, 8, torch.float32, CPU), _make_axis_code(19, 8, torch.float32, CPU))
        with DevicesOfResults() as devices:
            addresses(pointers, meta)
            axis_code(19, 8, torch.float32, meta)
            kernel_weights.stacked_codes(5, 7, 8, meta)
    assert devices.found == {"meta"}


def kept_by(flow: ConditionalFlow) -> list[weakref.ref[Tensor]]:
    """A tensor of every form of its weights that a frozen flow keeps."""
    assert flow._prepared is not None
    return [weakref.ref(form.layers[0].w2) for form in flow._prepared.values()]


def test_weights_of_a_frozen_flow_stay_for_its_graphs(captures_on_cpu: FakeCuda) -> None:
    """Through changes, other map sizes, another freeze and a move; they go with the flow."""
    flow = lively_flow(FlowSpec(8, 8, 2)).requires_grad_(False).freeze()
    x = torch.randn(24, 8)

    flow(x, PositionalRows(4, 6, channels=8), impl="torch")
    (read,) = kept_by(flow)
    with captures_on_cpu.capture():
        flow(x, PositionalRows(4, 6, channels=8), impl="torch")
        flow(x, PositionalRows(6, 4, channels=8), impl="torch")  # nothing fits: prepared in the graph
    assert [form() is read() for form in kept_by(flow)] == [True]
    flow.module_list[0].global_scale += 1
    for height in (1, 2, 3, 8, 12):
        flow(x, PositionalRows(height, 24 // height, channels=8), impl="torch")
    *others, unread = kept_by(flow)
    assert len(others) + 1 == MOST_ENTRIES
    flow.freeze().double()
    gc.collect()
    assert read() is not None
    assert unread() is None
    del flow
    gc.collect()
    assert read() is None


@pytest.mark.equivalence
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_replays_after_the_caches_were_emptied() -> None:
    """On a GPU: of a flow that keeps its weights and of one that packs them in the graph, through their addresses."""
    spec, where = FlowSpec(8, 8, 2), PositionalRows(4, 6, channels=8)
    kept = lively_flow(spec).cuda().requires_grad_(False).freeze()
    packed = lively_flow(spec).cuda().requires_grad_(False)
    x = torch.randn(24, 8, device="cuda")

    def call() -> Tensor:
        return torch.stack([flow(x, where, impl="triton").log_likelihood for flow in (kept, packed)])

    expected = call().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    kept.freeze()
    for i in range(300):
        addresses((i, i), x.device)
    for i in range(1, 70):
        kernel_weights.stacked_codes(i, 1, 8, x.device)
    junk = [torch.full((2**k,), torch.nan, device="cuda") for k in range(4, 20) for _ in range(20)]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
    del junk
