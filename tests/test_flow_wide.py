"""The wide flow (a library's products around the coupling kernels) against the oracle in float64.

The kernels do not care how wide the flow is, so most tests take few channels. Gradients are judged as whole tensors,
||g - exact|| / ||exact||, and against the oracle with the ReLU masks of the flow under test: a hidden unit within
rounding of zero may be on in one and off in the other, and then its gradient is there or not. About one unit in 10^4
does that in float16, which alone would make a difference of 10^-2; that the masks are right otherwise is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastbgad import reference
from fastbgad.errors import BackendError, ConfigError
from fastbgad.flow import ConditionalFlow
from fastbgad.flow_spec import CouplingWeights, FlowSpec
from fastbgad.ops import PositionalRows, flow_wide
from tests.flows import double, lively_flow

PRECISIONS = ["float32", "float16"]
# Relative errors of whole tensors. lp and log_det / C are averages over channels, where roundings cancel; z is not.
BUDGET = {
    "float32": {"lp": 1e-5, "z": 1e-5, "gradient": 1e-5},
    "float16": {"lp": 5e-5, "z": 5e-4, "gradient": 1e-3},
}
# As many rows as may be, since each program costs the interpreter time. Some tests take fewer columns, for loops.
TILES = {"BR": 16, "BC": 32, "num_warps": 4}


@pytest.fixture(autouse=True)
def _small_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Tiles for the interpreter, where each program costs milliseconds; a GPU runs the shipped ones."""
    if device.type == "cpu":
        from fastbgad.kernels import coupling

        def chosen(kernel: str, key: str, device: torch.device) -> Mapping[str, int]:
            return TILES

        monkeypatch.setattr(coupling, "chosen_tiles", chosen)


class Case:
    """A lively flow with features and a condition of one kind."""

    def __init__(self, device: torch.device, rows: int, channels: int, kind: str = "none", **options: Any) -> None:
        torch.manual_seed(rows + channels)
        self.spec = FlowSpec(channels, condition_channels=0 if kind == "none" else 8, **options)
        self.flow = lively_flow(self.spec).to(device)
        self.x = torch.randn(rows, channels, device=device, requires_grad=True)
        self.condition: PositionalRows | Tensor | None = None
        if kind == "dense":
            self.condition = torch.randn(rows, 8, device=device, requires_grad=True)
        elif kind == "gathered":
            self.condition = PositionalRows(11, 7, torch.randint(0, 77, (rows,), device=device), channels=8)
        elif kind == "raster":
            self.condition = PositionalRows(1, rows, channels=8)
        self.weights = self.flow.weights()

    @property
    def dense(self) -> Tensor | None:
        """The condition as float64 [N, P]."""
        if isinstance(self.condition, PositionalRows):
            return self.condition.dense(len(self.x), torch.float64, self.x.device)
        return None if self.condition is None else self.condition.detach().double()

    def run(self, precision: str, return_z: bool = True, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """The flow under test."""
        return flow_wide.forward(self.x, self.weights, self.spec, self.condition, return_z, precision, **options)

    def inputs(self) -> dict[str, Tensor]:
        """Everything that has a gradient, by name."""
        found = {"x": self.x, **names(self.weights)}
        return found | ({"condition": self.condition} if isinstance(self.condition, Tensor) else {})

    def operator_arguments(self, precision: str, keep: bool, return_z: bool = True) -> tuple[Any, ...]:
        """The same call, as the registered operator takes it."""
        positions = self.condition if isinstance(self.condition, PositionalRows) else None
        dense = self.condition if isinstance(self.condition, Tensor) else None
        height, width, index = (
            (0, 0, None) if positions is None else (positions.height, positions.width, positions.index)
        )
        weights = [tensor for layer in self.weights for tensor in layer]
        form = (self.spec.clamp, self.spec.clamp_form, self.spec.global_affine, self.spec.hard_permutation)
        return self.x, dense, index, weights, height, width, *form, precision, 20, return_z, keep

    def masks(self, precision: str) -> Tensor:
        """Which hidden units are on, [L, N, H]."""
        with torch.no_grad():
            return flow_wide.flow_wide(*self.operator_arguments(precision, keep=True))[5] > 0

    def exact(self, masks: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """The oracle in float64 with these ReLU masks: its lp, log_det and z, and its inputs by name."""
        layers = double(self.weights)
        x, dense = self.x.detach().double().requires_grad_(), self.dense
        inputs = {"x": x, **names(layers)}
        if isinstance(self.condition, Tensor) and dense is not None:
            inputs["condition"] = dense.requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "relu", MaskedReLU(masks))
            z, log_det = reference.flow_forward(x, layers, self.spec, dense)
        return (reference.log_likelihood(z, log_det), log_det, z), inputs


class MaskedReLU:
    """ReLU with given masks, one per call, that differ from the true ones only within rounding of zero."""

    def __init__(self, masks: Tensor) -> None:
        self.masks = iter(masks)

    def __call__(self, value: Tensor) -> Tensor:
        mask = next(self.masks)
        flipped = mask != (value > 0)
        assert (flipped & (value.abs() > 5e-3)).sum() == 0
        return value * mask


def names(layers: Sequence[CouplingWeights]) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": tensor
        for i, layer in enumerate(layers)
        for name, tensor in layer._asdict().items()
        if name != "w_perm"
    }


def error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||."""
    assert value.shape == exact.shape
    exact = exact.detach().double()
    return float((value.detach().double() - exact).norm() / exact.norm().clamp(min=1e-30))


def check(case: Case, precision: str, budget: Mapping[str, float], **options: Any) -> None:
    """lp, log_det, z and every gradient from all three of them."""
    got = case.run(precision, **options)
    exact, exact_inputs = case.exact(case.masks(precision))
    upstream = [torch.randn_like(tensor) for tensor in got]
    gradients = torch.autograd.grad(got, list(case.inputs().values()), upstream)
    exact_gradients = torch.autograd.grad(exact, list(exact_inputs.values()), [tensor.double() for tensor in upstream])
    lp, log_det, z = got
    channels = case.spec.channels
    assert error(lp, exact[0]) < budget["lp"]
    # log_det is a sum with changing signs: what matters is its share of lp.
    assert error(lp + (log_det - exact[1]) / channels, lp) < budget["lp"]
    assert error(z, exact[2]) < budget["z"]
    for name, value, truth in zip(exact_inputs, gradients, exact_gradients, strict=True):
        assert value.dtype == torch.float32
        assert error(value, truth) < budget["gradient"], name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["none", "dense", "gathered", "raster"])
@pytest.mark.parametrize(("rows", "channels"), [(1, 6), (63, 41)])
def test_forward_and_gradients(device: torch.device, precision: str, kind: str, rows: int, channels: int) -> None:
    budget = dict(BUDGET[precision])
    if channels == 6 and precision == "float16":
        budget["lp"] = 5e-4  # one row of six channels: no roundings that could cancel
    check(Case(device, rows, channels, kind, coupling_layers=3), precision, budget)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_wide(device: torch.device, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many channels as this path is for."""
    monkeypatch.setitem(TILES, "BC", 256)
    check(Case(device, 257, 300, "gathered", coupling_layers=2), precision, BUDGET[precision])


@pytest.mark.parametrize(
    ("form", "affine", "hard", "precision"),
    [
        ("tanh", "SOFTPLUS", True, "float16"),
        ("scaled_tanh", "SIGMOID", False, "float16"),
        ("scaled_tanh", "SIGMOID", True, "float32"),
        ("tanh", "EXP", True, "float32"),
        ("scaled_tanh", "EXP", False, "float32"),
    ],
)
def test_variants(
    device: torch.device, form: str, affine: str, hard: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TILES, "BC", 8)
    options = {"clamp": 1.3, "clamp_form": form, "global_affine": affine, "hard_permutation": hard}
    case = Case(device, 20, 41, "dense", coupling_layers=2, **options)
    check(case, precision, BUDGET[precision])
    check(case, precision, BUDGET[precision], recompute=True, chunk_rows=15)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("hard", [False, True])
def test_without_z(device: torch.device, precision: str, hard: bool) -> None:
    """lp alone needs no last permutation, forward or back; one layer has no permutation at all."""
    for layers in (1, 2):
        case = Case(device, 20, 41, "gathered", coupling_layers=layers, hard_permutation=hard)
        lp, log_det, z = case.run(precision, return_z=False)
        assert z is None
        with torch.no_grad():
            inference = case.run(precision)
        assert torch.equal(lp, inference[0])
        assert torch.equal(log_det, inference[1])
        exact, exact_inputs = case.exact(case.masks(precision))
        gradients = torch.autograd.grad(lp.sum(), list(case.inputs().values()))
        exact_gradients = torch.autograd.grad(exact[0].sum(), list(exact_inputs.values()))
        for name, value, truth in zip(exact_inputs, gradients, exact_gradients, strict=True):
            assert error(value, truth) < BUDGET[precision]["gradient"], name


@pytest.mark.parametrize("kind", ["dense", "gathered", "raster"])
def test_chunks(device: torch.device, kind: str) -> None:
    """Inference does not depend on the chunk, and maps in raster order may begin anywhere in it."""
    case = Case(device, 42, 9, kind, coupling_layers=3)
    if kind == "raster":
        case.condition = PositionalRows(2, 7, channels=8)
    with torch.no_grad():
        whole = case.run("float32")
        parts = case.run("float32", chunk_rows=11)
    for value, expected in zip(parts, whole, strict=True):
        assert error(value, expected) < 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_of_single_outputs(device: torch.device, precision: str) -> None:
    """Outputs that take no part in the loss have no gradient to pass on."""
    case = Case(device, 20, 9, coupling_layers=2)
    exact, exact_inputs = case.exact(case.masks(precision))
    for i in range(3):
        [value] = torch.autograd.grad(case.run(precision)[i].sum(), [case.x])
        [truth] = torch.autograd.grad(exact[i].sum(), [exact_inputs["x"]], retain_graph=True)
        assert error(value, truth) < BUDGET[precision]["gradient"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["gathered", "dense"])
def test_unusable_rows_stay_alone(device: torch.device, precision: str, kind: str) -> None:
    """They have NaN; the other rows have the bits, and the weights the gradients, that they have without them."""
    case = Case(device, 30, 41, kind, coupling_layers=3)
    upstream = [torch.randn(30, device=device), torch.randn(30, device=device), torch.randn(30, 41, device=device)]
    bad = torch.zeros(30, dtype=torch.bool, device=device)
    bad[[3, 7, 11, 20, 21]] = True
    usable = [tensor.masked_fill(bad[:, None] if tensor.dim() == 2 else bad, 0) for tensor in upstream]
    good = case.run(precision)
    expected = torch.autograd.grad(good, list(case.inputs().values()), usable)

    x = case.x.detach().clone()
    x[3, 0], x[7, 40], x[11, 5] = torch.nan, torch.nan, torch.inf
    if isinstance(case.condition, Tensor):
        case.condition = case.condition.detach().clone()
        case.condition[20, 7], case.condition[21, 0] = torch.nan, torch.inf
        case.condition.requires_grad_()
    elif case.condition is not None and case.condition.index is not None:
        case.condition.index[20], case.condition.index[21] = 77, -1
    case.x = x.requires_grad_()
    got = case.run(precision)
    for value, truth in zip(got, good, strict=True):
        assert value[bad].isnan().all()
        assert torch.equal(value[~bad], truth[~bad])
    # A loss of a NaN has a NaN gradient.
    for tensor in upstream:
        tensor[bad] = torch.nan
    for value, truth in zip(torch.autograd.grad(got, list(case.inputs().values()), upstream), expected, strict=True):
        assert error(value, truth) < 1e-6


def test_features_beyond_float16(device: torch.device) -> None:
    """Such a row is lost, not computed as another; a state that gets there on the way is clamped and stays finite."""
    case = Case(device, 8, 9, coupling_layers=3)
    with torch.no_grad():
        case.x.clamp_(-1, 1).mul_(6e4)
        case.x[2, 3] = 65505
        case.weights = [
            layer._replace(w1=layer.w1 * 1e-3, global_scale=layer.global_scale + 10) for layer in case.weights
        ]
        lp, _, z = case.run("float16")
        exact = case.run("float32")
    assert z is not None
    usable = torch.arange(8, device=device) != 2
    assert lp.isfinite().equal(usable)
    assert z.isfinite().all(dim=1).equal(usable)
    assert exact[0].isfinite().all()
    assert exact[2] is not None
    assert exact[2].abs().max() > 65504


def test_permutation_is_accurate(device: torch.device) -> None:
    """With a subnet that says 0 only the permutations are left: in plain float16 they would be off by 2e-4."""
    case = Case(device, 20, 41, coupling_layers=3)
    case.weights = [layer._replace(w2=layer.w2 * 0, b2=layer.b2 * 0) for layer in case.weights]
    _, _, z = case.run("float16")
    exact, exact_inputs = case.exact(case.masks("float16"))
    assert z is not None
    assert error(z, exact[2]) < 5e-6
    upstream = torch.randn_like(z)
    [value] = torch.autograd.grad(z, [case.x], upstream)
    [truth] = torch.autograd.grad(exact[2], [exact_inputs["x"]], upstream.double())
    assert error(value, truth) < 5e-6


@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_small_and_large_upstream_gradients(device: torch.device, size: float) -> None:
    """Gradients are scaled by a power of two before they are cast, and back."""
    case = Case(device, 40, 41, coupling_layers=3)
    exact, exact_inputs = case.exact(case.masks("float16"))
    upstream = torch.rand(40, device=device) * size
    gradients = torch.autograd.grad(case.run("float16")[0], list(case.inputs().values()), upstream)
    exact_gradients = torch.autograd.grad(exact[0], list(exact_inputs.values()), upstream.double())
    for name, value, truth in zip(exact_inputs, gradients, exact_gradients, strict=True):
        assert error(value, truth) < BUDGET["float16"]["gradient"], name


@pytest.mark.parametrize("rows", [0, 5])
def test_no_gradient_or_no_rows(device: torch.device, rows: int) -> None:
    """Zero upstream gradients, and no rows at all, give zeros."""
    case = Case(device, max(rows, 1), 9, "gathered", coupling_layers=2)
    assert isinstance(case.condition, PositionalRows)
    case.x = case.x.detach()[:rows].requires_grad_()
    assert case.condition.index is not None
    case.condition.index = case.condition.index[:rows]
    lp, log_det, z = case.run("float16")
    assert z is not None
    assert lp.shape == log_det.shape == (rows,)
    assert z.shape == (rows, 9)
    for gradient in torch.autograd.grad(lp.sum() * 0, list(case.inputs().values())):
        assert (gradient == 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_bits_twice(device: torch.device, precision: str) -> None:
    case = Case(device, 63, 9, "gathered", coupling_layers=2)
    runs = []
    for _ in range(2):
        got = case.run(precision)
        runs.append([*got, *torch.autograd.grad([tensor.sum() for tensor in got], list(case.inputs().values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_has_no_influence(device: torch.device) -> None:
    """Neither around the forward nor around the backward."""
    case = Case(device, 20, 9, "gathered", coupling_layers=2)
    for precision in PRECISIONS:
        plain = case.run(precision)
        expected = torch.autograd.grad(plain[0].sum(), list(case.inputs().values()))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            got = case.run(precision)
            gradients = torch.autograd.grad(got[0].sum(), list(case.inputs().values()))
        assert all(torch.equal(a, b) for a, b in zip([*got, *gradients], [*plain, *expected], strict=True))


def test_half_precision_features_and_weights(device: torch.device) -> None:
    """Narrow tensors are computed in float32; their gradients come back in their own type."""
    case = Case(device, 20, 9, coupling_layers=2)
    weights = [CouplingWeights(*(tensor.detach().bfloat16() for tensor in layer)) for layer in case.weights]
    x = case.x.detach().bfloat16().requires_grad_()
    lp, _, _ = flow_wide.forward(x, weights, case.spec, None, False, "float32")
    wide = [CouplingWeights(*(tensor.float() for tensor in layer)) for layer in weights]
    expected, _, _ = flow_wide.forward(x.detach().float(), wide, case.spec, None, False, "float32")
    assert lp.dtype == torch.float32
    assert torch.equal(lp, expected)
    assert torch.autograd.grad(lp.sum(), [x])[0].dtype == torch.bfloat16


def test_kept_bytes(device: torch.device) -> None:
    """What the module says training keeps per row and layer (the first layer's input is x itself)."""
    case = Case(device, 10, 12, coupling_layers=3)
    hidden = case.spec.hidden_channels
    for precision, per_layer in (("float16", 4 * 6 + 2 * hidden), ("float32", 8 * 6 + 4 * hidden)):
        kept = flow_wide.flow_wide(*case.operator_arguments(precision, keep=True))[3:]
        assert sum(tensor.nbytes for tensor in kept) == 10 * (3 * per_layer + 2 * 4 * 12)
    assert not any(t.numel() for t in flow_wide.flow_wide(*case.operator_arguments("float16", keep=False))[3:])


def test_large_training_sets_keep_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(device, 20, 9, coupling_layers=2)
    keep = []
    operator = flow_wide.flow_wide

    def spy(*arguments: Any) -> tuple[Tensor, ...]:
        keep.append(arguments[-1])
        return operator(*arguments)

    monkeypatch.setattr(flow_wide, "flow_wide", spy)
    gradients = []
    for limit in (1 << 20, 100):
        monkeypatch.setattr(flow_wide, "LARGEST_KEPT", limit)
        gradients += torch.autograd.grad(case.run("float32", chunk_rows=20)[0].sum(), [case.x])
    assert keep == [True, False]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("kind", "keep"), [("dense", True), ("gathered", False)])
def test_opcheck(device: torch.device, kind: str, keep: bool) -> None:
    case = Case(device, 10, 6, kind, coupling_layers=2)
    torch.library.opcheck(flow_wide.flow_wide, case.operator_arguments("float16", keep))
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in case.operator_arguments("float16", keep)]
    arguments[3] = [tensor.detach() for tensor in arguments[3]]
    lp, log_det, z, *kept = flow_wide.flow_wide(*arguments)
    options = (*arguments[:12], keep, True, kind == "dense")
    torch.library.opcheck(flow_wide.flow_wide_backward, (lp, log_det, z, lp, *kept, *options))


def test_compiled(device: torch.device) -> None:
    """No graph break, forward or back, and the same bits."""
    case = Case(device, 12, 6, "gathered", coupling_layers=2)

    def loss(x: Tensor) -> Tensor:
        lp, log_det, _ = flow_wide.forward(x, case.flow.weights(), case.spec, case.condition, False, "float16")
        return lp.sum() + log_det.mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    parameters = [case.x, *(p for p in case.flow.parameters() if p.requires_grad)]
    expected, got = (torch.autograd.grad(run(case.x), parameters) for run in (loss, compiled))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported graphs run there on the portable path; training is refused by name."""
    case = Case(torch.device("cpu"), 12, 9, "gathered", coupling_layers=2)
    arguments = case.operator_arguments("float32", keep=False)
    expected = flow_wide.flow_wide(*arguments)

    class Exported(torch.nn.Module):
        def __init__(self, flow: ConditionalFlow) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            positions = PositionalRows(11, 7, index, channels=8)
            with torch.no_grad():
                return flow_wide.forward(x, self.flow.weights(), case.spec, positions, False, "float32")[0]

    program = torch.export.export(Exported(case.flow), (case.x.detach(), arguments[2]))
    monkeypatch.setattr(flow_wide, "interpreting", lambda: False)
    for value, truth in zip(flow_wide.flow_wide(*arguments)[:3], expected[:3], strict=True):
        assert error(value, truth) < 1e-5
    assert error(program.module()(case.x.detach(), arguments[2]), expected[0]) < 1e-5
    with pytest.raises(BackendError, match="trains on CUDA"):
        case.run("float32")
    lp, _, _ = case.run("float32", recompute=True)
    with pytest.raises(BackendError, match="trains on CUDA"):
        lp.sum().backward()


def test_products_on_a_gpu_take_these_arguments() -> None:
    """The calls that only CUDA tensors reach, on tensors without data: shapes, types and strides are accepted."""
    with FakeTensorMode():
        a, b = torch.empty(64, 32, device="cuda").half(), torch.empty(16, 32, device="cuda").half()
        for total in (torch.empty(64, 16, device="cuda"), torch.empty(64, 40, device="cuda")[:, :16]):
            flow_wide._add_product(total, a, b.T)
            assert flow_wide._product(a, b.T, total.clone()).dtype == torch.float32
        assert flow_wide._product(a, b.T, total.half().contiguous()).dtype == torch.float16
        flow_wide._hidden_units(a, b, torch.empty(16, device="cuda").half(), total.half().contiguous())


def test_unknown_precision(device: torch.device) -> None:
    with pytest.raises(ConfigError, match="choose one of float16, float32"):
        Case(device, 2, 6, coupling_layers=1).run("bfloat16")


@pytest.mark.parametrize("scaled_tanh", [False, True])
def test_saturated_coupling(device: torch.device, scaled_tanh: bool) -> None:
    """Activations far beyond where tanh is flat: no overflow on the way, s = +-clamp, and no gradient."""
    from fastbgad.kernels.coupling import PLAIN, Coupling, coupling_backward, coupling_forward

    a_s = torch.tensor([-torch.inf, -3e38, -1e4, 0.0, 1e4, 3e38, torch.inf], device=device)
    a = torch.stack([a_s, torch.zeros_like(a_s)], dim=1)
    x = torch.ones(7, 2, device=device)
    one, zero = torch.ones(2, device=device), torch.zeros(2, device=device)
    layer = Coupling(zero, one, zero, None, 1.9, scaled_tanh)
    v, log_det, _ = coupling_forward(x, a, layer, torch.zeros(7, device=device), form=PLAIN.value)
    s = 1.9 * torch.tensor([-1.0, -1, -1, 0, 1, 1, 1], device=device)
    assert error(log_det, s) < 1e-6
    assert error(v[:, 1], s.exp()) < 1e-6
    _, da, *_ = coupling_backward(x, a, layer, torch.ones_like(v), None, torch.ones(7, device=device), form=PLAIN.value)
    slope = 0.1 if scaled_tanh else 0.19  # ds/da at 0; the factor is dy2 x2 exp(s) + d_log_det = 2
    assert torch.allclose(da[:, 0], torch.tensor([0, 0, 0, 2 * slope, 0, 0, 0], device=device))
