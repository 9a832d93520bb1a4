"""Accelerated flows as modules: tensors, copies, checkpoints, optimizers, containers, compilation."""

from __future__ import annotations

import copy
import io
import pickle
import socket

import pytest
import torch
from torch import Tensor, nn

import fastbgad
from fastbgad.compat.bgad import FlowDecoder
from fastbgad.compat.freia.acceleration import AcceleratedFlow
from fastbgad.errors import UnsupportedFlowError
from fastbgad.flow_spec import FlowSpec

from ...flows import budget, relative_error
from .freia_flows import HEIGHT, WIDTH, flow_of, gradients, inputs

pytestmark = pytest.mark.usefixtures("few_rows_are_enough")


def test_same_tensors_keys_and_class() -> None:
    flow = flow_of("soft", 6, 8)
    parameters, keys, cls = list(flow.parameters()), list(flow.state_dict()), type(flow)
    fastbgad.accelerate(flow)
    assert all(a is b for a, b in zip(flow.parameters(), parameters, strict=True))
    assert list(flow.state_dict()) == keys
    assert isinstance(flow, cls)
    assert len(flow) == 3
    assert flow[1] is flow.module_list[1]
    assert fastbgad.accelerate(flow) is flow  # again is allowed and changes nothing
    x, c = inputs(6, 8, 4)
    found = flow(x, c)[0]
    assert fastbgad.restore(flow) is flow
    assert type(flow) is cls
    assert "_fastbgad" not in vars(flow)
    assert torch.allclose(flow(x, c)[0], found)
    assert fastbgad.restore(flow) is flow


def test_restore_gives_the_lambdas_back() -> None:
    flow = flow_of("main hard", 4, 0)
    before = [block.permute_function for block in flow.module_list]
    fastbgad.restore(fastbgad.accelerate(flow))
    assert [block.permute_function for block in flow.module_list] == before


def test_optimiser_and_checkpoint_go_on() -> None:
    """Twenty steps of Adam, accelerated half-way, end where those of the original end."""
    torch.manual_seed(0)
    flows = [flow_of("soft", 5, 8), flow_of("soft", 5, 8)]
    flows[1].load_state_dict(flows[0].state_dict())
    optimizers = [torch.optim.Adam(flow.parameters(), lr=1e-3) for flow in flows]
    for step in range(20):
        if step == 10:
            fastbgad.accelerate(flows[1])
            state = copy.deepcopy(flows[1].state_dict())
            flows[1].load_state_dict(state)
        x, c = inputs(5, 8, 40 + step)
        for flow, optimizer in zip(flows, optimizers, strict=True):
            z, log_det = flow(x, c)
            loss = (0.5 * z.square().sum(dim=1) - log_det).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for a, b in zip(*(flow.parameters() for flow in flows), strict=True):
        assert relative_error(b, a) < 1e-10


def test_weights_that_change_are_noticed() -> None:
    flow = fastbgad.accelerate(flow_of("soft", 5, 8))
    x, c = inputs(5, 8, 12)
    with torch.no_grad():
        first = flow(x, c)[0]
        assert torch.equal(flow(x, c)[0], first)
        flow.module_list[0].subnet[0].weight.mul_(1.5)
        second = flow(x, c)[0]
        assert not torch.allclose(second, first)
        flow.module_list[1].global_offset.data.add_(1)  # behind PyTorch's back
        flow.eval()
        assert not torch.allclose(flow(x, c)[0], second)
        assert torch.allclose(flow(x, c)[0], fastbgad.restore(copy.deepcopy(flow))(x, c)[0])


def test_exchanged_blocks_are_read_again() -> None:
    flow = fastbgad.accelerate(flow_of("soft", 5, 8))
    x, c = inputs(5, 8, 12)
    flow.module_list.append(flow_of("soft", 5, 8, layers=1, seed=3).module_list[0])
    flow.conditions.append(0)
    expected = fastbgad.restore(copy.deepcopy(flow))(x, c)[0]
    assert torch.allclose(flow(x, c)[0], expected)
    flow.module_list[2].subnet = nn.Linear(11, 4).double()
    with pytest.raises(UnsupportedFlowError, match=r"module_list.2 .*Linear"):
        flow(x, c)


def test_copies_and_pickles() -> None:
    for kind in ("soft", "main hard"):
        flow = fastbgad.accelerate(flow_of(kind, 5, 8))
        x, c = inputs(5, 8, 12)
        expected = flow(x, c)
        buffer = io.BytesIO()
        torch.save(flow, buffer)
        buffer.seek(0)
        for twin in (
            copy.deepcopy(flow),
            pickle.loads(pickle.dumps(flow)),
            torch.load(buffer, weights_only=False),
        ):
            assert type(twin) is type(flow)
            assert torch.equal(twin(x, c)[0], expected[0])
            assert next(iter(twin.parameters())) is not next(iter(flow.parameters()))
            with torch.no_grad():
                twin.module_list[0].global_offset += 1
            assert not torch.allclose(twin(x, c)[0], expected[0])
            assert torch.equal(flow(x, c)[0], expected[0])
            restored = fastbgad.restore(twin)
            assert not isinstance(restored, AcceleratedFlow)
            restored(x, c)


def test_shared_weights() -> None:
    """The same block twice in one flow, and in two flows: gradients add up."""

    def losses(accelerated: bool) -> list[Tensor]:
        first, second = flow_of("soft", 6, 8, layers=2), flow_of("soft", 6, 8, layers=1, seed=1)
        first.module_list[1] = first.module_list[0]
        second.module_list[0] = first.module_list[0]
        if accelerated:
            fastbgad.accelerate(first)
            fastbgad.accelerate(second)
        x, c = inputs(6, 8, 11)
        (first(x, c)[0].square().sum() + second(x, c)[1].sum()).backward()
        return [p.grad for p in first.parameters() if p.grad is not None]

    for found, expected in zip(losses(True), losses(False), strict=True):
        assert relative_error(found, expected) < budget(torch.float64, 500)


def test_inside_other_modules() -> None:
    model = nn.ModuleDict(
        {"head": nn.Linear(3, 3), "levels": nn.ModuleList([flow_of("soft", 4, 8), flow_of("hard", 6, 8)])}
    )
    head = model["head"]
    fastbgad.accelerate(model)
    assert all(isinstance(flow, AcceleratedFlow) for flow in model["levels"])
    assert type(head) is nn.Linear
    fastbgad.restore(model)
    assert not any(isinstance(flow, AcceleratedFlow) for flow in model["levels"])


def test_our_own_flows_are_fast_already() -> None:
    for flow in (fastbgad.ConditionalFlow(FlowSpec(4, 8, 1)), FlowDecoder(FlowSpec(4, 8, 1))):
        cls = type(flow)
        assert fastbgad.restore(fastbgad.accelerate(flow)) is flow
        assert type(flow) is cls


def test_torch_compile_and_export() -> None:
    original = flow_of("soft", 6, 128, layers=2).float()
    fast = fastbgad.accelerate(copy.deepcopy(original))
    where = fastbgad.positional_rows(HEIGHT, WIDTH)
    x, _ = inputs(6, 0, HEIGHT * WIDTH, torch.float32)
    expected = original(x, [where.values()])
    compiled = torch.compile(fast, backend="eager")
    for condition in (where, where.values()):
        for found, truth in zip(compiled(x, [condition]), expected, strict=True):
            assert relative_error(found, truth) < budget(torch.float32, 60)
    compiled(x, [where])[0].sum().backward()
    assert fast.module_list[0].subnet[0].weight.grad is not None
    exported = torch.export.export(fast, (x, [where.values()]))
    assert torch.allclose(exported.module()(x, [where.values()])[0], expected[0], atol=1e-6)


def test_distributed_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process (gloo): its hooks fire for every parameter, and the gradients are the original's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        original = flow_of("soft", 5, 8)
        fast = fastbgad.accelerate(copy.deepcopy(original))
        x, c = inputs(5, 8, 16)
        wrapped = nn.parallel.DistributedDataParallel(fast)
        for found, expected in zip(gradients(wrapped, x, c), gradients(original, x, c), strict=True):
            assert relative_error(found, expected) < budget(torch.float64, 500)
        inside = nn.parallel.DistributedDataParallel(copy.deepcopy(original))
        fastbgad.accelerate(inside)
        assert isinstance(inside.module, AcceleratedFlow)
        inside(x, c)[0].sum().backward()
    finally:
        torch.distributed.destroy_process_group()
