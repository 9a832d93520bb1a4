"""The log-likelihood of a latent: kernels and portable path against the oracle in float64, and their registration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.errors import BackendError, ConfigError, FeatureError
from fastbgad.ops import log_likelihood
from fastbgad.ops.log_likelihood.registered import log_likelihood_backward_op, log_likelihood_op

pytest.importorskip("triton")

EPS = torch.finfo(torch.float32).eps
HALF = (torch.float16, torch.bfloat16)


def make_rows(
    rows: int, channels: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * channels + rows)
    z = 3 * torch.randn(rows, channels, generator=generator)
    log_det = channels * torch.randn(rows, generator=generator)
    return z.to(device, dtype).requires_grad_(), log_det.to(device, dtype).requires_grad_()


def make_upstream(rows: int, device: torch.device) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(rows)).to(device)


def require_equal(z: Tensor, log_det: Tensor, impl: str) -> tuple[Tensor, ...]:
    """lp and both gradients within a few roundings of the oracle on the same values; returns the three."""
    rows, channels = z.shape
    computed = torch.float64 if torch.float64 in (z.dtype, log_det.dtype) else torch.float32
    eps = torch.finfo(computed).eps
    upstream = make_upstream(rows, z.device).to(computed)
    lp = log_likelihood(z, log_det, impl=impl)
    d_z, d_log_det = torch.autograd.grad(lp, (z, log_det), upstream)

    exact_z, exact_log_det = (t.detach().double().requires_grad_() for t in (z, log_det))
    exact = reference.log_likelihood(exact_z, exact_log_det)
    exact_d_z, exact_d_log_det = torch.autograd.grad(exact, (exact_z, exact_log_det), upstream.double())

    assert lp.dtype == computed
    assert lp.shape == (rows,)
    # Every partial sum is rounded, and no path through a sum of blocks or of a tree is longer than this.
    summands = 0.5 * exact_z.detach().square().sum(dim=1) + exact_log_det.detach().abs()
    budget = eps * ((8 + math.log2(channels) + channels / 256) * summands / channels + 2)
    assert ((lp.detach().double() - exact.detach()).abs() <= budget).all()
    for found, truth, like in ((d_z, exact_d_z, z), (d_log_det, exact_d_log_det, log_det)):
        assert found.dtype == like.dtype
        narrow = torch.finfo(like.dtype)
        smallest = narrow.smallest_normal * narrow.eps
        # The interpreter cuts digits off where a GPU rounds to bfloat16.
        rounding = 1.0 if like.dtype == torch.bfloat16 and like.device.type == "cpu" else 0.5
        assert torch.allclose(found.double(), truth, rtol=rounding * narrow.eps + 3 * eps, atol=smallest)
    return lp, d_z, d_log_det


@pytest.mark.equivalence
@pytest.mark.parametrize("rows", [0, 1, 63, 1023])
@pytest.mark.parametrize("channels", [1, 8, 41, 200, 513])
@pytest.mark.usefixtures("poisoned")
def test_equals_oracle(rows: int, channels: int, device: torch.device) -> None:
    require_equal(*make_rows(rows, channels, device), "triton")


@pytest.mark.equivalence
@pytest.mark.parametrize("channels", [16, 40, 72, 4096])
@pytest.mark.parametrize(
    "types", [(torch.float16,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)], ids=str
)
@pytest.mark.usefixtures("poisoned")
def test_narrow_types(channels: int, types: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    """They are read as they are, so lp has the error of float32."""
    z, log_det = make_rows(37, channels, device, torch.float16)
    require_equal(
        *(t.detach().to(dtype).requires_grad_() for t, dtype in zip((z, log_det), types, strict=True)), "triton"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "channels"), [(0, 8), (1, 1), (1023, 41), (63, 513)])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_without_kernels(rows: int, channels: int, dtype: torch.dtype, impl: str) -> None:
    require_equal(*make_rows(rows, channels, torch.device("cpu"), dtype), impl)


def test_float64_in_one_input_makes_the_result_float64() -> None:
    z, log_det = make_rows(5, 3, torch.device("cpu"))
    require_equal(z, log_det.detach().double().requires_grad_(), "auto")
    require_equal(z.detach().double().requires_grad_(), log_det, "auto")


def test_by_hand() -> None:
    """z = (3, 4) and log_det = 7: (-ln(2 pi) - 12.5 + 7) / 2."""
    z, log_det = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([7.0], requires_grad=True)
    for impl in ("torch", "reference", "auto"):
        lp = log_likelihood(z, log_det, impl=impl)
        assert float(lp.detach()) == pytest.approx((-math.log(2 * math.pi) - 5.5) / 2)
        d_z, d_log_det = torch.autograd.grad(lp.sum(), (z, log_det))
        assert d_z.tolist() == [[-1.5, -2.0]]
        assert d_log_det.tolist() == [0.5]


VIEWS = {
    "rows of a wider tensor": lambda z: torch.cat([z, z], dim=1)[:, : z.shape[1]],
    "from an odd column on": lambda z: torch.cat([z[:, :3], z], dim=1)[:, 3:],
    "every second row": lambda z: z.repeat_interleave(2, dim=0)[::2],
    "one row for all": lambda z: z[:1].expand(len(z), -1),
    "channels apart": lambda z: z.T.contiguous().T,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("channels", [16, 40, 41])
@pytest.mark.usefixtures("poisoned")
def test_strides(view: str, channels: int, device: torch.device) -> None:
    z, log_det = make_rows(70, channels, device)
    strided = VIEWS[view](z.detach()).requires_grad_()
    assert view == "from an odd column on" or strided.stride() != z.stride()
    spread = torch.stack([log_det.detach(), log_det.detach()], dim=1)[:, 1].requires_grad_()
    found = require_equal(strided, spread, "triton")
    plain = require_equal(
        strided.detach().clone(memory_format=torch.contiguous_format).requires_grad_(), log_det, "triton"
    )
    for value, truth in zip(found, plain, strict=True):
        assert torch.equal(value, truth)


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Rows 2^30 values apart: the third starts at 2^31. Nothing but the rows themselves is touched."""
    z, log_det = make_rows(3, 8, device, torch.float16)
    far = torch.empty(2**31 + 8, dtype=torch.float16, device=device).as_strided((3, 8), (2**30, 1))
    far.copy_(z.detach())
    require_equal(far.requires_grad_(), log_det, "triton")


@pytest.mark.parametrize("reduce", [Tensor.sum, Tensor.mean])
def test_gradient_of_a_sum(reduce, device: torch.device) -> None:
    """One number for all rows, which the kernel reads without spreading it out."""
    z, log_det = make_rows(63, 41, device)
    factor = 1.0 if reduce is Tensor.sum else 1 / 63
    d_z, d_log_det = torch.autograd.grad(reduce(log_likelihood(z, log_det, impl="triton")), (z, log_det))
    assert torch.allclose(d_z, -z.detach() * factor / 41, rtol=4 * EPS, atol=0)
    assert torch.allclose(d_log_det, torch.full_like(d_log_det, factor / 41), rtol=4 * EPS)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nan_and_infinite_rows_stay_alone(impl: str, device: torch.device) -> None:
    z, log_det = make_rows(63, 300, device)
    plain = require_equal(z, log_det, impl)
    spoilt, spoilt_det = z.detach().clone(), log_det.detach().clone()
    spoilt[5, 299], spoilt[8, 0], spoilt_det[20] = math.nan, math.inf, math.nan
    spoilt.requires_grad_()
    spoilt_det.requires_grad_()
    lp = log_likelihood(spoilt, spoilt_det, impl=impl)
    d_z, d_log_det = torch.autograd.grad(lp, (spoilt, spoilt_det), make_upstream(63, device))
    assert torch.isnan(lp[[5, 20]]).all()
    assert lp[8] == -math.inf
    others = torch.ones(63, dtype=torch.bool, device=device)
    others[[5, 8, 20]] = False
    for found, truth in zip((lp, d_z, d_log_det), plain, strict=True):
        assert torch.equal(found[others], truth[others])
    # The gradient of z is a product of its own entry.
    assert torch.isnan(d_z).nonzero().tolist() == [[5, 299]]
    assert torch.isinf(d_z).nonzero().tolist() == [[8, 0]]


def test_upstream_nan_stays_in_its_row(device: torch.device) -> None:
    z, log_det = make_rows(63, 41, device)
    upstream = make_upstream(63, device)
    upstream[7] = math.nan
    d_z, d_log_det = torch.autograd.grad(log_likelihood(z, log_det, impl="triton"), (z, log_det), upstream)
    assert torch.isnan(d_z).any(dim=1).nonzero().tolist() == [[7]]
    assert torch.isnan(d_log_det).nonzero().tolist() == [[7]]


def test_same_bits_twice(device: torch.device) -> None:
    z, log_det = make_rows(1023, 200, device)
    for first, second in zip(*(require_equal(z, log_det, "triton") for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("wanted", ["z", "log_det"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_gradient_alone(wanted: str, impl: str, device: torch.device) -> None:
    z, log_det = make_rows(63, 41, device)
    _, *both = require_equal(z, log_det, impl)
    leaf = z if wanted == "z" else log_det
    lp = log_likelihood(z if leaf is z else z.detach(), log_det if leaf is log_det else log_det.detach(), impl=impl)
    (found,) = torch.autograd.grad(lp, leaf, make_upstream(63, device))
    assert torch.equal(found, both[0] if leaf is z else both[1])


def test_gradcheck_of_the_portable_path() -> None:
    """The second derivative too, which the kernels do not have and say so."""
    inputs = make_rows(3, 5, torch.device("cpu"), torch.float64)
    assert torch.autograd.gradcheck(lambda z, d: log_likelihood(z, d, impl="torch"), inputs)
    assert torch.autograd.gradgradcheck(lambda z, d: log_likelihood(z, d, impl="torch"), inputs)


def test_kernels_refuse_a_second_derivative(device: torch.device) -> None:
    z, log_det = make_rows(3, 5, device)
    (d_z,) = torch.autograd.grad(log_likelihood(z, log_det, impl="triton").square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        d_z.sum().backward()


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_autocast_changes_nothing(impl: str, device: torch.device) -> None:
    z, log_det = make_rows(63, 41, device)
    plain = require_equal(z, log_det, impl)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for found, truth in zip(require_equal(z, log_det, impl), plain, strict=True):
            assert torch.equal(found, truth)


BAD = {
    "one row": (torch.zeros(3), torch.zeros(3), r"\[N, C\].*\(3,\)"),
    "no channel": (torch.zeros(3, 0), torch.zeros(3), "at least 1"),
    "too few": (torch.zeros(3, 2), torch.zeros(2), r"\(3, 2\) and \(2,\)"),
    "a column": (torch.zeros(3, 2), torch.zeros(3, 1), r"\(3, 1\)"),
    "whole numbers": (torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3), "floating point, not torch.int32"),
    "whole log_det": (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), "torch.int64"),
    "devices": (torch.zeros(3, 2), torch.zeros(3, device="meta"), "on cpu but log_det is on meta"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("impl", ["auto", "torch", "triton", "reference"])
def test_bad_input(case: str, impl: str) -> None:
    z, log_det, message = BAD[case]
    with pytest.raises(FeatureError, match=message):
        log_likelihood(z, log_det, impl=impl)


def test_bad_implementation(device: torch.device) -> None:
    z, log_det = make_rows(3, 2, device)
    with pytest.raises(ConfigError, match="cuda"):
        log_likelihood(z, log_det, impl="cuda")
    for inputs in ((z.double(), log_det), (z, log_det.double())):
        with pytest.raises(BackendError, match="float64"):
            log_likelihood(*inputs, impl="triton")


# The registered operations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    z, log_det = make_rows(63, 41, device, dtype)
    torch.library.opcheck(log_likelihood_op, (z, log_det))
    wide = torch.cat([z, z], dim=1).detach()[:, :41]
    torch.library.opcheck(log_likelihood_op, (wide.requires_grad_(), log_det))
    torch.library.opcheck(log_likelihood_backward_op, (wide.detach(), make_upstream(63, device), dtype))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compile(dynamic: bool, impl: str, device: torch.device) -> None:
    """Forward and backward in one graph each, with the bits of the uncompiled form."""

    def step(z: Tensor, log_det: Tensor) -> Tensor:
        return log_likelihood(2 * z, log_det, impl=impl).mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (63, 41):
        inputs = make_rows(rows, 24, device)
        runs = [(total, *torch.autograd.grad(total, inputs)) for total in (step(*inputs), compiled(*inputs))]
        for plain, found in zip(*runs, strict=True):
            assert torch.equal(plain, found)


class Module(torch.nn.Module):
    def forward(self, z: Tensor, log_det: Tensor) -> Tensor:
        return log_likelihood(z, log_det, impl="triton")


def test_export(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One node for any number of rows; without the interpreter a CPU runs it by the portable path."""
    inputs = tuple(t.detach() for t in make_rows(63, 41, device))
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Module(), inputs, dynamic_shapes=({0: rows}, {0: rows}))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("fastbgad.log_likelihood" in call for call in calls) == 1
    other = tuple(t.detach() for t in make_rows(200, 41, device))
    assert torch.equal(program.module()(*other), log_likelihood(*other, impl="triton"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    on_cpu = tuple(t.cpu() for t in other)
    expected = log_likelihood(*on_cpu, impl="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(program.module().cpu()(*on_cpu), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_registered_operations_without_the_interpreter(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Values, gradients and their types, as in a graph made on a GPU and run elsewhere."""
    runs = []
    for place in (device, torch.device("cpu")):
        if runs:
            monkeypatch.setenv("TRITON_INTERPRET", "0")
        z, log_det = make_rows(63, 41, place, dtype)
        lp = log_likelihood_op(z, log_det)
        runs.append([lp.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(lp, (z, log_det), lp.detach()))])
    for kernel, portable in zip(*runs, strict=True):
        assert kernel.dtype == portable.dtype
        eps = torch.finfo(kernel.dtype).eps
        assert torch.allclose(kernel.float(), portable.float(), rtol=2 * eps + 16 * EPS, atol=1e-6)
