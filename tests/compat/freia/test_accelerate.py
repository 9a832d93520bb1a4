"""`fastbgad.accelerate` against the flows it accelerates: FrEIA 0.2, FrEIA's main branch, anomalib's blocks."""

from __future__ import annotations

import copy
import io
import pickle
import socket
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbgad
from fastbgad.compat.bgad import FlowDecoder
from fastbgad.compat.freia import acceleration
from fastbgad.compat.freia.acceleration import AcceleratedFlow
from fastbgad.errors import ConfigError, FeatureError, UnsupportedFlowError
from fastbgad.flow_spec import FlowSpec

from ...flows import budget, freia_flow, relative_error, subnet, whole_error

pytest.importorskip("FrEIA")

HEIGHT, WIDTH = 3, 5


@pytest.fixture(autouse=True)
def _few_rows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accelerated way in every test, also where the original would be as quick."""
    monkeypatch.setattr(acceleration, "FEWEST_TRAINING_ROWS", 0)


def flow_of(kind: str, channels: int, condition: int, layers: int = 3, seed: int = 0) -> Any:
    """A flow in float64: 'soft', 'hard' (FrEIA 0.2), 'main soft', 'main hard' (FrEIA's main branch), 'anomalib'."""
    if kind.startswith("main"):
        from ...freia_main import freia_main_flow

        return freia_main_flow(channels, condition, layers, soft=kind == "main soft", seed=seed).double()
    if kind == "anomalib":
        from anomalib.models.image.cflow.utils import cflow_head

        torch.manual_seed(seed)
        return cflow_head(condition, layers, 1.9, channels, permute_soft=False).double()
    flow = freia_flow(FlowSpec(channels, condition, layers), seed=seed)
    if kind == "hard":
        with torch.no_grad():
            for block in flow.module_list:
                block.w_perm.copy_(torch.eye(channels)[torch.randperm(channels)])
                block.w_perm_inv.copy_(block.w_perm.T)
    return flow


def inputs(channels: int, condition: int, rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Any]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, channels, generator=generator, dtype=torch.float64).to(dtype)
    c = [torch.randn(rows, condition, generator=generator, dtype=torch.float64).to(dtype)] if condition else None
    return x, c


def error_of(found: Tensor, exact: Tensor, flow: Any) -> float:
    """Largest error of z, or of log_det in units of the sum that it is: up to clamp per active channel and layer."""
    if exact.dim() == 2:
        return relative_error(found, exact)
    terms = flow.spec.clamp * flow.spec.active_channels * flow.spec.coupling_layers
    return float(
        (found.detach().double() - exact.detach().double()).abs().max() / max(terms, float(exact.detach().abs().max()))
    )


def gradients(flow: nn.Module, x: Tensor, c: Any) -> list[Tensor]:
    """Of x, of a condition and of all parameters, for a loss that depends on z and on log_det row by row."""
    leaves = [x.clone().requires_grad_(), *(t.clone().requires_grad_() for t in c or ())]
    flow.zero_grad()
    z, log_det = flow(leaves[0], leaves[1:] or None)
    weight = torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)
    (weight * (z.square().sum(dim=1) - log_det)).sum().backward()
    return [t.grad for t in (*leaves, *flow.parameters()) if t.grad is not None]


@pytest.mark.parametrize("rows", [1, 7, 1023])
@pytest.mark.parametrize("condition", [0, 8])
@pytest.mark.parametrize("channels", [2, 5, 8])
@pytest.mark.parametrize("kind", ["soft", "hard", "main soft", "main hard"])
def test_same_results_and_gradients(kind: str, channels: int, condition: int, rows: int) -> None:
    original = flow_of(kind, channels, condition)
    fast = copy.deepcopy(original)
    assert fastbgad.accelerate(fast) is fast
    assert fast.spec.clamp_form == ("scaled_tanh" if kind.startswith("main") else "tanh")
    assert fast.spec.hard_permutation == kind.endswith("hard")
    x, c = inputs(channels, condition, rows)
    for rev in (False, True):
        for found, expected in zip(fast(x, c, rev=rev), original(x, c, rev=rev), strict=True):
            assert found.shape == expected.shape
            assert found.dtype == expected.dtype
            assert error_of(found, expected, fast) < budget(torch.float64, 100)
    for found, expected in zip(gradients(fast, x, c), gradients(original, x, c), strict=True):
        assert relative_error(found, expected) < budget(torch.float64, 100 + 10 * rows)


@pytest.mark.parametrize("affine", ["SIGMOID", "EXP"])
def test_other_global_affines(affine: Any) -> None:
    original = freia_flow(FlowSpec(6, 4, 2, global_affine=affine))
    fast = fastbgad.accelerate(copy.deepcopy(original))
    assert fast.spec.global_affine == affine
    x, c = inputs(6, 4, 9)
    assert relative_error(fast(x, c)[0], original(x, c)[0]) < budget(torch.float64, 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["soft", "hard", "main hard", "anomalib"])
def test_narrow_types(kind: str, dtype: torch.dtype) -> None:
    """The results have the flow's own type and are no further from the exact ones than the original's."""
    exact_flow = flow_of(kind, 9, 8)
    original = copy.deepcopy(exact_flow).to(dtype)
    exact_flow.load_state_dict({name: t.double() for name, t in original.state_dict().items()})
    fast = fastbgad.accelerate(copy.deepcopy(original))
    x, c = inputs(9, 8, 65, dtype)
    exact = exact_flow(x.double(), [c[0].double()])
    for found, theirs, truth in zip(fast(x, c), original(x, c), exact, strict=True):
        assert found.dtype == theirs.dtype == dtype
        error = error_of(found, truth, fast)
        assert error < budget(dtype, 30)
        assert error <= 2 * error_of(theirs, truth, fast) + torch.finfo(dtype).eps


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


def test_positions_are_recognised() -> None:
    """The separable path gives what the dense condition gives; positions in any order, whole maps, one row."""
    original = flow_of("soft", 6, 128, layers=2)
    fast = fastbgad.accelerate(copy.deepcopy(original))
    area = HEIGHT * WIDTH
    for index in (None, torch.randperm(area)[:7], torch.tensor([4]), torch.randint(0, area, (70,))):
        where = fastbgad.positional_rows(HEIGHT, WIDTH, index, dtype=torch.float64)
        x, _ = inputs(6, 0, len(where))
        dense = where.values()
        for rev in (False, True):
            for found, expected in zip(fast(x, [where], rev=rev), original(x, [dense], rev=rev), strict=True):
                assert error_of(found, expected, fast) < budget(torch.float64, 100)
        theirs, _ = original(x, [where])  # the original takes it as a tensor
        assert torch.allclose(theirs, original(x, [dense])[0], rtol=0, atol=0)
        fast.zero_grad()
        fast(x, [where])[0].square().sum().backward()
        original.zero_grad()
        original(x, [dense])[0].square().sum().backward()
        for a, b in zip(fast.parameters(), original.parameters(), strict=True):
            if b.grad is not None:
                assert relative_error(a.grad, b.grad) < budget(torch.float64, 500)


@pytest.mark.equivalence
@pytest.mark.parametrize("places", [False, True], ids=["dense", "places"])
@pytest.mark.parametrize("kind", ["soft", "hard", "main soft"])
def test_on_the_kernels(kind: str, places: bool, device: torch.device) -> None:
    """The same through Triton's kernels, on a GPU or in the interpreter, with the float32 operands of `accelerate`."""
    exact_flow = flow_of(kind, 6, 128, layers=2)
    original = copy.deepcopy(exact_flow).float()
    exact_flow.load_state_dict({name: t.to(exact_flow.state_dict()[name]) for name, t in original.state_dict().items()})
    fast = fastbgad.accelerate(original.to(device), impl="triton")
    area = HEIGHT * WIDTH
    where = fastbgad.positional_rows(HEIGHT, WIDTH, torch.randperm(area, device=device))
    x = torch.randn(area, 6, generator=torch.Generator().manual_seed(0))
    exact = exact_flow(x.double(), [where.values().cpu().double()])
    found = fast(x.to(device), [where if places else where.values()])
    for value, truth in zip(found, exact, strict=True):
        assert error_of(value.cpu(), truth, fast) < 2e-5
    weight = torch.linspace(0.5, 1.5, area)
    for flow, (z, log_det) in ((exact_flow, exact), (fast, found)):
        flow.zero_grad()
        (weight.to(z) * (z.square().sum(dim=1) - log_det)).mean().backward()
    for a, b in zip(fast.parameters(), exact_flow.parameters(), strict=True):
        if b.grad is not None:
            assert whole_error(a.grad.cpu(), b.grad) < 1e-3


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


def test_frozen_and_mixed_parameters() -> None:
    original = flow_of("soft", 5, 8)
    fast = fastbgad.accelerate(copy.deepcopy(original))
    x, c = inputs(5, 8, 30)
    for flow in (original, fast):
        flow.requires_grad_(False)
        flow.module_list[1].subnet.requires_grad_(True)
        flow.module_list[2].global_offset.requires_grad_(True)
    found, expected = gradients(fast, x, c), gradients(original, x, c)
    assert len(found) == len(expected) == 2 + 4 + 1
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < budget(torch.float64, 500)
    fast.requires_grad_(False)
    assert not fast(x, c)[0].requires_grad


def test_a_trained_permutation_runs_the_original() -> None:
    flow = fastbgad.accelerate(flow_of("soft", 5, 8))
    x, c = inputs(5, 8, 6)
    flow.module_list[0].w_perm.requires_grad_(True)
    with pytest.warns(UserWarning, match="w_perm requires a gradient"):
        z, _ = flow(x, c)
    z.sum().backward()
    assert flow.module_list[0].w_perm.grad is not None
    with torch.no_grad():
        assert torch.allclose(flow(x, c)[0], z)


def test_training_calls_of_few_rows_run_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "FEWEST_TRAINING_ROWS", 8)
    original = flow_of("soft", 5, 128)
    fast, explicit = (fastbgad.accelerate(copy.deepcopy(original), impl=impl) for impl in ("auto", "torch"))
    calls: list[nn.Module] = []
    for flow in (fast, explicit):
        flow.module_list[0].register_forward_hook(lambda block, *_: calls.append(block))
    for rows, own in ((7, True), (8, False)):
        x = inputs(5, 0, rows)[0]
        where = fastbgad.positional_rows(HEIGHT, WIDTH, torch.arange(rows), dtype=torch.float64)
        expected = original(x, [where.values()])
        for flow in (fast, explicit):
            calls.clear()
            assert torch.allclose(flow(x, [where])[0], expected[0], rtol=1e-9)
            assert calls == ([fast.module_list[0]] if own and flow is fast else [])
            with torch.no_grad():
                assert torch.allclose(flow(x, [where])[1], expected[1], rtol=1e-9)
            assert len(calls) == int(own and flow is fast)


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


def test_autocast_and_tuple_output() -> None:
    flow = flow_of("soft", 6, 8).float()
    fast = fastbgad.accelerate(copy.deepcopy(flow))
    x, c = inputs(6, 8, 20, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = fast(x.bfloat16(), [c[0].bfloat16()])
    assert z.dtype == log_det.dtype == torch.float32
    assert relative_error(z, flow(x.bfloat16().float(), [c[0].bfloat16().float()])[0]) < 1e-5
    fast.force_tuple_output = True
    (inner,), _ = fast((x,), c)
    assert torch.allclose(inner, flow(x, c)[0], atol=1e-5)


def test_no_rows() -> None:
    fast = fastbgad.accelerate(flow_of("soft", 6, 8))
    z, log_det = fast(torch.empty(0, 6).double(), [torch.empty(0, 8).double()])
    assert z.shape == (0, 6)
    assert log_det.shape == (0,)


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


def unsupported_flows() -> dict[str, tuple[Any, str]]:
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    def block(make: Any = subnet, channels: int = 6, **options: Any) -> Any:
        flow = Ff.SequenceINN(channels)
        flow.append(Fm.AllInOneBlock, subnet_constructor=make, **options)
        return flow

    def mixed() -> Any:
        flow = block()
        flow.append(Fm.AllInOneBlock, subnet_constructor=subnet, affine_clamping=3.0)
        return flow

    def other_module() -> Any:
        flow = block()
        flow.append(Fm.PermuteRandom)
        return flow

    def two_conditions() -> Any:
        flow = Ff.SequenceINN(6)
        for which in (0, 1):
            flow.append(Fm.AllInOneBlock, cond=which, cond_shape=(8,), subnet_constructor=subnet)
        return flow

    def another_clamp() -> Any:
        flow = block()
        flow.module_list[0]._affine = lambda x, a: (x * torch.exp(0.2 * torch.atan(0.1 * a[:, : x.shape[1]])), 0)
        return flow

    def not_orthogonal() -> Any:
        flow = block(permute_soft=True)
        with torch.no_grad():
            flow.module_list[0].w_perm.mul_(2)
        return flow

    def hidden_change() -> Any:
        """A subclass that computes something else while its attributes are those of an AllInOneBlock."""

        class AllInOneBlock(Fm.AllInOneBlock):
            def forward(self, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
                out, log_det = super().forward(x, c, rev, jac)
                return (2 * out[0],), log_det

        flow = Ff.SequenceINN(6)
        flow.append(AllInOneBlock, subnet_constructor=subnet)
        return flow

    def poisoned() -> Any:
        flow = block()
        with torch.no_grad():
            flow.module_list[0].global_offset[0, 0] = torch.nan
        return flow

    def maps() -> Any:
        flow = Ff.SequenceINN(6, 4, 4)
        flow.append(Fm.AllInOneBlock, subnet_constructor=lambda i, o: nn.Conv2d(i, o, 1))
        return flow

    deep = lambda i, o: nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, o))  # noqa: E731
    gelu = lambda i, o: nn.Sequential(nn.Linear(i, 2 * i), nn.GELU(), nn.Linear(2 * i, o))  # noqa: E731
    narrow = lambda i, o: nn.Sequential(nn.Linear(i, 5), nn.ReLU(), nn.Linear(5, o))  # noqa: E731
    bare = lambda i, o: nn.Sequential(nn.Linear(i, 2 * i, bias=False), nn.ReLU(), nn.Linear(2 * i, o))  # noqa: E731
    return {
        "GIN": (block(gin_block=True), "GIN"),
        "Householder": (block(learned_householder_permutation=2), "learned"),
        "reverse": (block(reverse_permutation=True), "reverse_permutation"),
        "deep subnet": (block(deep), "only Linear, ReLU, Linear"),
        "gelu subnet": (block(gelu), "GELU"),
        "narrow subnet": (block(narrow), "5 hidden units"),
        "subnet without bias": (block(bare), "no bias"),
        "mixed clamps": (mixed(), r"module_list.1 .*clamp=3.0"),
        "other module": (other_module(), "PermuteRandom"),
        "two conditions": (two_conditions(), "takes condition 1"),
        "another clamp": (another_clamp(), "neither"),
        "not orthogonal": (not_orthogonal(), "not orthogonal"),
        "computes something else": (hidden_change(), "something else"),
        "not finite": (poisoned(), "not finite"),
        "maps": (maps(), "2-dimensional maps"),
        "odd condition": (_odd_condition(), "multiple of 4"),
    }


def _odd_condition() -> Any:
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    flow = Ff.SequenceINN(6)
    flow.append(Fm.AllInOneBlock, cond=0, cond_shape=(7,), subnet_constructor=subnet)
    return flow


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", list(unsupported_flows()))
def test_unsupported_flows_stay_as_they_were(name: str) -> None:
    flow, reason = unsupported_flows()[name]
    both = nn.ModuleList([flow_of("soft", 4, 0), flow])
    before = [(module, type(module), dict(vars(module))) for module in both.modules()]
    with pytest.raises(UnsupportedFlowError, match=reason):
        fastbgad.accelerate(both)
    for module, cls, attributes in before:
        assert type(module) is cls
        assert vars(module).keys() == attributes.keys()


def test_clear_errors() -> None:
    with pytest.raises(UnsupportedFlowError, match="contains no flow"):
        fastbgad.accelerate(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="impl is 'fast'"):
        fastbgad.accelerate(flow_of("soft", 4, 0), impl="fast")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="precision is 'int8'"):
        fastbgad.accelerate(flow_of("soft", 4, 0), precision="int8")  # type: ignore[arg-type]
    flow = fastbgad.accelerate(flow_of("soft", 4, 8))
    x, c = inputs(4, 8, 5)
    with pytest.raises(FeatureError, match="needs a condition"):
        flow(x)
    with pytest.raises(FeatureError, match="5 feature rows but a condition of 4"):
        flow(x, [c[0][:4]])
    with pytest.raises(FeatureError, match="takes a condition of 8 channels, got 128"):
        flow(x, [fastbgad.positional_rows(1, 5)])
    with pytest.raises(FeatureError, match=r"\[N, 4\]"):
        flow(x[:, :3], c)


def test_explicit_impl_never_falls_back() -> None:
    flow = fastbgad.accelerate(flow_of("soft", 4, 8), impl="triton")
    x, c = inputs(4, 8, 5)
    with pytest.raises(fastbgad.FastBGADError, match='impl="triton": the kernels compute in float32'):
        flow(x, c)
    x, c = inputs(4, 8, 5, torch.float32)
    reference = fastbgad.accelerate(flow_of("soft", 4, 8).float(), impl="reference")
    assert torch.allclose(reference(x, c)[0], flow_of("soft", 4, 8).float()(x, c)[0], atol=1e-5)
