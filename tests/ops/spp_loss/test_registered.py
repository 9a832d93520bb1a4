"""The loss kernels: one program and many, against the oracle in float64; gradients; the registered operations."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.errors import BackendError
from fastbgad.ops import contrastive_loss, spp_loss
from fastbgad.ops.spp_loss.registered import spp_loss_backward_op, spp_loss_op
from fastbgad.reference import SppLoss
from tests.grids import grid

pytest.importorskip("triton")

OPTIONS = {"beta": 0.05, "tau": 0.3, "lam": 0.7, "normalizer": 5.0}
AXES = {"ml_form": ["logsigmoid", "nll"], "reduction": ["mean", "sum"], "focal": [False, True], "push": [True, False]}
CHOICES = [dict(zip(AXES, choice, strict=True)) for choice in itertools.product(*AXES.values())]
TERMS = ("total", "ml", "normal", "anomalous")
COUNTS = ("normal_violations", "anomalous_violations")
MANY = 4096 + 1027  # more than one program takes


def mixed(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return 4 * torch.randn(rows, generator=generator) - 3, torch.rand(rows, generator=generator) < 0.2


def with_special_rows(rows: int, share: float) -> tuple[Tensor, Tensor]:
    """Infinite and NaN rows of both kinds, few enough for a boundary at a finite row."""
    lp, anomalous = mixed(rows)
    lp[5:9] = torch.tensor([math.nan, math.inf, -math.inf, -1e30])
    anomalous[5:9] = share > 0.5
    return lp, anomalous


CASES = {
    "no row": lambda: mixed(0),
    "one normal": lambda: (torch.tensor([-1.5]), torch.tensor([False])),
    "one anomaly": lambda: (torch.tensor([-1.5]), torch.tensor([True])),
    "two rows": lambda: (torch.tensor([-1.5, -2.5]), torch.tensor([False, True])),
    "63": lambda: mixed(63),
    "1023": lambda: mixed(1023),
    "4096": lambda: mixed(4096),
    "many": lambda: mixed(MANY),
    "no anomalies": lambda: (mixed(63)[0], torch.zeros(63, dtype=torch.bool)),
    "only anomalies": lambda: (mixed(63)[0], torch.ones(63, dtype=torch.bool)),
    "only anomalies, many": lambda: (mixed(MANY)[0], torch.ones(MANY, dtype=torch.bool)),
    "all violating": lambda: (torch.full((64,), -2.0), torch.arange(64) % 2 == 0),
    "no anomaly violating": lambda: (torch.cat([torch.rand(50), torch.full((9,), -40.0)]), torch.arange(59) >= 50),
    "ties": lambda: (mixed(500)[0].round() * 5, mixed(500)[1]),
}


def oracle(lp: Tensor, anomalous: Tensor, **options: object) -> tuple[SppLoss, Tensor]:
    """In float64 on the CPU, on the same rounded values, so the same rows violate."""
    exact = lp.detach().cpu().double().requires_grad_()
    return reference.spp_loss(exact, anomalous.cpu(), 40, **options), exact


def gradient(total: Tensor, lp: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(total, lp, retain_graph=True, allow_unused=True)
    return torch.zeros_like(lp) if found is None else found


def require_close(value: Tensor, truth: Tensor, rows: int, name: str) -> None:
    """Rounding errors of a sum of so many float32 terms; relative to what a mean or a gradient of a row is made of."""
    rounding = 4 * math.sqrt(max(rows, 1)) * torch.finfo(torch.float32).eps
    value, truth = value.detach().cpu().double(), truth.detach()
    smallest = rounding if value.dim() == 0 else rounding / max(rows, 1)
    assert torch.allclose(value, truth, rtol=rounding, atol=smallest, equal_nan=True), (name, value, truth)


@pytest.mark.equivalence
@grid(case=CASES, **AXES)
@pytest.mark.usefixtures("poisoned")
def test_equals_oracle(case: str, ml_form: str, reduction: str, focal: bool, push: bool, device: torch.device) -> None:
    choice = {"ml_form": ml_form, "reduction": reduction, "focal": focal, "push": push}
    lp, anomalous = CASES[case]()
    fast_lp = lp.to(device).requires_grad_()
    fast = spp_loss(fast_lp, anomalous.to(device), 40, impl="triton", **OPTIONS, **choice)
    exact, exact_lp = oracle(lp, anomalous, **OPTIONS, **choice)
    for name in TERMS:
        assert getattr(fast, name).dtype == torch.float32
        require_close(getattr(fast, name), getattr(exact, name), len(lp), name)
    for name in COUNTS:
        assert getattr(fast, name).dtype == torch.int64
        assert int(getattr(fast, name)) == int(getattr(exact, name)), name
    require_close(fast.b_n, exact.b_n, 1, "b_n")
    require_close(fast.b_a, exact.b_a, 1, "b_a")
    require_close(gradient(fast.total, fast_lp), gradient(exact.total, exact_lp), len(lp), "gradient")


@pytest.mark.parametrize("rows", [63, MANY])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.999])
def test_every_term_has_a_gradient(rows: int, beta: float, device: torch.device) -> None:
    lp, anomalous = mixed(rows)
    options = {**OPTIONS, "beta": beta, "focal": True}
    fast_lp = lp.to(device).requires_grad_()
    fast = spp_loss(fast_lp, anomalous.to(device), 40, impl="triton", **options)
    exact, exact_lp = oracle(lp, anomalous, **options)
    assert not fast.b_n.requires_grad
    assert not fast.b_a.requires_grad
    assert not fast.normal_violations.requires_grad
    for factors in [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0.5, -2, 3, 0.7)]:
        used = [(name, factor) for name, factor in zip(TERMS, factors, strict=True) if factor]
        got = gradient(sum(factor * getattr(fast, name) for name, factor in used), fast_lp)
        expected = gradient(sum(factor * getattr(exact, name) for name, factor in used), exact_lp)
        assert used == [("anomalous", 1)] or expected.abs().max() > 0
        require_close(got, expected, rows, str(factors))


@grid(rows=[63, MANY], share=[0.0, 1.0], beta=[0.05, 0.999], focal=[False, True])
@pytest.mark.usefixtures("poisoned")
def test_infinite_and_nan_rows(rows: int, share: float, beta: float, focal: bool, device: torch.device) -> None:
    """They do in their terms what they do in the portable path, and nothing outside them."""
    lp, anomalous = with_special_rows(rows, share)
    options = {**OPTIONS, "beta": beta, "focal": focal, "channels": 40}
    fast_lp = lp.to(device, copy=True).requires_grad_()
    fast = spp_loss(fast_lp, anomalous.to(device), impl="triton", **options)
    portable_lp = lp.clone().requires_grad_()
    portable = spp_loss(portable_lp, anomalous, impl="torch", **options)
    for name, value, truth in zip(SppLoss._fields, fast, portable, strict=True):
        if value.is_floating_point():
            require_close(value, truth.double(), rows, name)
        else:
            assert int(value) == int(truth), name
    u = lp / options["normalizer"]
    under = {
        "ml": ~anomalous,
        "normal": ~anomalous & (u <= portable.b_n),
        "anomalous": anomalous & (u >= portable.b_a),
    }
    for name, its_rows in under.items():
        got, truth = gradient(getattr(fast, name), fast_lp).cpu(), gradient(getattr(portable, name), portable_lp)
        require_close(got[its_rows], truth[its_rows].double(), rows, f"gradient of {name}")
        assert (got[~its_rows] == 0).all(), name


def test_rows_outside_a_term_may_hold_anything(device: torch.device) -> None:
    """An anomalous row whose exponential overflows and whose focal weight is infinite."""
    lp = torch.tensor([-1.0, -2.0, 3e38], device=device, requires_grad=True)
    mask = torch.tensor([False, False, True], device=device)
    loss = spp_loss(lp, mask, 3, focal=True, push=False, impl="triton")
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert torch.isfinite(lp.grad).all()
    assert float(lp.grad[2]) == 0


def test_minus_logsigmoid_is_accurate_to_the_last_bits(device: torch.device) -> None:
    """Relative to its own size, also where it is tiny."""
    for x in (-90.0, -20.0, -3.0, -0.7, -1e-3, 0.0, 1e-4, 0.3, 2.0, 9.0, 17.0, 60.0):
        lp = torch.tensor([x], device=device, requires_grad=True)
        loss = spp_loss(lp, torch.zeros(1, dtype=torch.bool, device=device), 3, impl="triton")
        exact = torch.tensor(x, dtype=torch.float64)
        # exp rounds its argument: up to |x| units in the last place.
        precision = (4 + abs(x)) * torch.finfo(torch.float32).eps
        assert float(loss.ml.detach()) == pytest.approx(float(-torch.nn.functional.logsigmoid(exact)), rel=precision)
        assert float(gradient(loss.ml, lp)) == pytest.approx(-float(torch.sigmoid(-exact)), rel=precision)


def test_sums_of_many_rows_stay_accurate(device: torch.device) -> None:
    """Rows far above 0 in L_ml: a running float32 sum would lose digits that the two stages keep."""
    rows = 100_000
    lp = -3 - torch.rand(rows, generator=torch.Generator().manual_seed(0))
    anomalous = torch.arange(rows) % 10 == 0
    fast = spp_loss(lp.to(device), anomalous.to(device), 40, impl="triton", ml_form="nll")
    exact, _ = oracle(lp, anomalous, ml_form="nll")
    for name in TERMS:
        # u and b_n are rounded before they are subtracted: that much is lost whatever the sums do.
        assert float(getattr(fast, name)) == pytest.approx(float(getattr(exact, name).detach()), rel=1e-6, abs=3e-8)


def test_more_partial_sums_than_one_round_adds(device: torch.device) -> None:
    from fastbgad.kernels.spp_loss import spp_loss_forward

    rows = 64 * 70 - 5
    lp, anomalous = mixed(rows)
    exact, _ = oracle(lp, anomalous, **OPTIONS)
    fast = spp_loss_forward(
        lp.to(device), anomalous.to(device), 40, nll=False, mean=True, focal=False, push=True,
        edges=(exact.b_n.float().to(device), exact.b_a.float().to(device)), tile=64, finish_tile=32, **OPTIONS,
    )  # fmt: skip
    for name in TERMS:
        require_close(getattr(fast, name), getattr(exact, name), rows, name)
    assert [int(getattr(fast, name)) for name in COUNTS] == [int(getattr(exact, name)) for name in COUNTS]


@pytest.mark.parametrize("rows", [4096, MANY])
def test_same_bits_twice(rows: int, device: torch.device) -> None:
    lp, anomalous = (t.to(device) for t in mixed(rows))
    runs = []
    for _ in range(2):
        leaf = lp.clone().requires_grad_()
        loss = spp_loss(leaf, anomalous, 40, focal=True, impl="triton")
        runs.append([*loss, gradient(loss.total, leaf)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.filterwarnings("ignore:.*double precision:UserWarning")
def test_gradcheck(focal: bool, device: torch.device) -> None:
    """Finite differences in float32, under a given boundary because the gradient holds the boundary fixed. The focal
    weights are held fixed too, so with them only rows whose weight is 1 move."""
    lp = torch.tensor([-1.5, -1.9, -0.4, 0.9, -12.0, -30.0], device=device, requires_grad=True)
    mask = torch.tensor([False, False, False, False, True, True], device=device)
    b_n, b_a = torch.tensor(-0.1, device=device), torch.tensor(-1.5, device=device)

    def terms(lp: Tensor) -> tuple[Tensor, ...]:
        return spp_loss_op(lp, mask, 3, 0.01, 0.1, 0.7, 10.0, "logsigmoid", "mean", focal, True, b_n, b_a)[:4]

    assert torch.autograd.gradcheck(terms, lp, eps=1e-2, atol=5e-4, rtol=5e-3)


def test_strided_and_narrow_input(device: torch.device) -> None:
    lp, anomalous = mixed(900)
    for view in (lp[::3].to(device), lp[::3].bfloat16().to(device)):
        leaf = view.detach().requires_grad_()
        loss = spp_loss(leaf, anomalous[::3].to(device), 40, impl="triton", **OPTIONS)
        exact, exact_lp = oracle(view.float(), anomalous[::3], **OPTIONS)
        assert loss.total.dtype == torch.float32
        require_close(loss.total, exact.total, 300, "total")
        got = gradient(loss.total, leaf)
        assert got.dtype == view.dtype
        assert torch.allclose(got.cpu().double(), gradient(exact.total, exact_lp), rtol=4 * torch.finfo(view.dtype).eps)


def test_kernels_share_the_constants_of_the_oracle() -> None:
    kernels = importlib.import_module("fastbgad.kernels.spp_loss")
    equations = importlib.import_module("fastbgad.reference.spp_loss")
    assert kernels.FOCAL_NORMALIZER.value == equations.FOCAL_NORMALIZER
    assert kernels.FOCAL_SMALLEST_U.value == equations.FOCAL_SMALLEST_U


def test_float64_is_refused() -> None:
    lp, anomalous = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(BackendError, match="float64"):
        spp_loss(lp, anomalous, 3, impl="triton")
    with pytest.raises(BackendError, match="float64"):
        contrastive_loss(lp, anomalous, 0.1, impl="triton")


# The registered operations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_opcheck(given: bool, device: torch.device) -> None:
    lp, anomalous = (t.to(device) for t in mixed(63))
    edges = (torch.tensor(-0.5, device=device), torch.tensor(-0.8, device=device)) if given else (None, None)
    leaf = lp.clone().requires_grad_()
    arguments = (anomalous, 40, 0.05, 0.3, 0.7, 5.0, "logsigmoid", "mean", True, True, *edges)
    torch.library.opcheck(spp_loss_op, (leaf, *arguments))
    saved = spp_loss_op(lp, *arguments)[4:]
    one = torch.ones((), device=device)
    torch.library.opcheck(
        spp_loss_backward_op,
        (lp, anomalous, 40, *saved, one, None, None, one, 0.7, 5.0, "logsigmoid", "mean", True, True),
    )


@pytest.mark.parametrize("rows", [63, MANY])
def test_compile(rows: int, device: torch.device) -> None:
    """Forward and backward in one graph each, with the bits of the uncompiled loss."""
    lp, anomalous = (t.to(device) for t in mixed(rows))

    def step(lp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = spp_loss(2 * lp, anomalous, 40, focal=True, impl="triton", **OPTIONS)
        return loss.total + loss.normal, loss.b_n, loss.normal_violations

    runs = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = lp.clone().requires_grad_()
        total, *others = call(leaf)
        total.backward()
        runs.append([total, *others, leaf.grad])
    for plain, compiled in zip(*runs, strict=True):
        assert torch.equal(plain, compiled)


@pytest.mark.parametrize("choice", CHOICES[::3], ids=lambda choice: " ".join(map(str, choice.values())))
def test_registered_operations_without_the_interpreter(
    choice: dict, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """On CPU tensors, as in a graph exported on a GPU and run elsewhere: the portable path, the same numbers."""
    lp, anomalous = mixed(500)
    runs = []
    for place in (device, torch.device("cpu")):
        if runs:
            monkeypatch.setenv("TRITON_INTERPRET", "0")
        leaf = lp.to(place, copy=True).requires_grad_()
        terms = spp_loss_op(leaf, anomalous.to(place), 40, 0.05, 0.3, 0.7, 5.0, *choice.values())
        gradients = [gradient(terms[0] + 2 * terms[2], leaf), gradient(terms[1], leaf)]
        runs.append([t.detach().cpu() for t in (*terms, *gradients)])
    for kernel, portable in zip(*runs, strict=True):
        assert kernel.dtype == portable.dtype
        assert kernel.abs().max() > 0 or not choice["push"]
        assert torch.allclose(kernel, portable, rtol=2e-5, atol=1e-6)


# The contrastive loss, which has no kernel ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if "many" not in case and case != "4096"])
def test_contrastive_equals_oracle(case: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    # Blocks of less than all rows.
    monkeypatch.setattr(importlib.import_module("fastbgad.ops.spp_loss.portable"), "PAIRS_AT_ONCE", 100_000)
    lp, anomalous = CASES[case]()
    fast_u = (lp / 10).to(device).requires_grad_()
    exact_u = fast_u.detach().cpu().double().requires_grad_()
    fast = contrastive_loss(fast_u, anomalous.to(device), 0.3, impl="triton")
    exact = reference.contrastive_loss(exact_u, anomalous, 0.3)
    for name, value, truth in zip(("pull", "push"), fast, exact, strict=True):
        assert float(value.detach()) == pytest.approx(float(truth.detach()), rel=1e-5, abs=1e-7), name
        got, expected = gradient(value, fast_u).cpu().double(), gradient(truth, exact_u)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 / max(len(lp), 1)), name


def test_contrastive_waits_for_nothing(device: torch.device) -> None:
    """A boolean index or a copy to the host would break the graph."""
    u, anomalous = (mixed(80)[0] / 10).to(device).requires_grad_(), mixed(80)[1].to(device)
    compiled = torch.compile(
        lambda u: contrastive_loss(u, anomalous, 0.3, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    plain = contrastive_loss(u, anomalous, 0.3, impl="triton")
    for value, truth in zip(compiled(u), plain, strict=True):
        assert torch.equal(value, truth)
        assert torch.equal(gradient(value, u), gradient(truth, u))
