"""The boundary's kernels: one program and many, against the oracle; the registered operation; bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastbgad import reference
from fastbgad.errors import BackendError
from fastbgad.kernels.boundary import SMALL_LIMIT, TILE, boundary_finish, boundary_histograms
from fastbgad.ops import boundary
from fastbgad.ops.boundary.registered import boundary_op
from tests.grids import grid


def values(kind: str, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    lp = 4 * torch.randn(rows, generator=generator) - 3
    if kind == "ties":
        return (lp / 4).round()
    if kind == "special":
        special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, -3e38])
        chosen = torch.randint(0, 12, (rows,), generator=generator)
        return torch.where(chosen < len(special), special[chosen.clamp(max=len(special) - 1)], lp)
    return lp


def require_equal(got: tuple[Tensor, ...], lp: Tensor, anomalous: Tensor, *options: float) -> None:
    """Bit for bit (NaN being NaN) the oracle's on the CPU, where its division is the correctly rounded one."""
    lp, anomalous = lp.cpu(), anomalous.cpu()
    for value, truth in zip(got[:2], reference.boundary(lp, anomalous, *options), strict=True):
        assert value.dtype == torch.float32
        assert torch.allclose(value.cpu(), truth, rtol=0, atol=0, equal_nan=True)
    assert got[2].dtype == torch.int64
    assert int(got[2]) == int((~anomalous).sum())


@pytest.mark.equivalence
@grid(
    rows=[0, 1, 2, 63, 1023, 1025, 4096, SMALL_LIMIT + 1, 2 * TILE + 77],
    kind=["random", "ties", "special"],
    share=[0.0, 0.3, 1.0],
)
@pytest.mark.usefixtures("poisoned")
def test_equals_oracle(rows: int, kind: str, share: float, device: torch.device) -> None:
    lp = values(kind, rows)
    anomalous = torch.rand(rows, generator=torch.Generator().manual_seed(1)) < share
    for beta in (0.0, 0.01, 0.5, 0.999):
        got = boundary(lp.to(device), anomalous.to(device), beta=beta, tau=0.2, normalizer=7.0, impl="triton")
        require_equal(got, lp, anomalous, beta, 0.2, 7.0)


@pytest.mark.parametrize("max_programs", [1, 2])
def test_several_tiles_per_program(max_programs: int, device: torch.device) -> None:
    lp, anomalous = values("random", 3 * TILE + 5).to(device), (torch.arange(3 * TILE + 5) % 5 == 0).to(device)
    histograms = boundary_histograms(lp, anomalous, 0.3, max_programs=max_programs)
    assert torch.equal(histograms, boundary_histograms(lp, anomalous, 0.3))
    require_equal(boundary_finish(histograms, 0.3, 0.1, 10.0), lp, anomalous, 0.3, 0.1, 10.0)


@pytest.mark.parametrize("rows", [100, 5000])
@pytest.mark.parametrize(("beta", "rank"), [(0.29, 28), (0.01, 1)])
def test_rank_is_the_float64_product(rows: int, beta: float, rank: int, device: torch.device) -> None:
    """int(100 * 0.29) is 28, in float32 it would be 29; int(100 * 0.01) is 1, with beta rounded to float32 0."""
    lp = torch.arange(rows, dtype=torch.float32, device=device).flip(0)
    mask = lp >= 100
    got = boundary(lp, mask, beta=beta, normalizer=1.0, impl="triton")
    assert float(got.b_n) == rank == int(100 * beta)


@pytest.mark.parametrize("rows", [9, 5000])
def test_zeros_of_both_signs_are_one_value(rows: int, device: torch.device) -> None:
    lp = torch.zeros(rows, device=device)
    lp[::2] = -0.0
    for beta in (0.0, 0.5, 0.9):
        got = boundary(lp, torch.zeros_like(lp, dtype=torch.bool), beta=beta, impl="triton")
        assert float(got.b_n) == 0
        assert not torch.signbit(got.b_n)


def test_strided_and_narrow_input(device: torch.device) -> None:
    lp, anomalous = values("random", 999).to(device), (torch.arange(999) % 4 == 0).to(device)
    got = boundary(lp[::3], anomalous[::3], beta=0.1, impl="triton")
    require_equal(got, lp[::3], anomalous[::3], 0.1, 0.1, 10.0)
    for dtype in (torch.float16, torch.bfloat16):
        got = boundary(lp.to(dtype), anomalous, beta=0.1, impl="triton")
        require_equal(got, lp.to(dtype).float(), anomalous, 0.1, 0.1, 10.0)


def test_float64_and_tensors_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="float64"):
        boundary(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.bool), impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="CUDA"):
        boundary(torch.zeros(3), torch.zeros(3, dtype=torch.bool), impl="triton")


def test_registered_operation_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors, as in a graph exported on a GPU and run elsewhere."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    lp, anomalous = values("special", 500), torch.arange(500) % 3 == 0
    require_equal(boundary_op(lp, anomalous, 0.2, 0.1, 7.0), lp, anomalous, 0.2, 0.1, 7.0)


@pytest.mark.parametrize("rows", [63, SMALL_LIMIT + 1])
def test_opcheck(rows: int, device: torch.device) -> None:
    lp, anomalous = values("random", rows).to(device), (torch.arange(rows) % 4 == 0).to(device)
    torch.library.opcheck(boundary_op, (lp, anomalous, 0.01, 0.1, 10.0))


def test_compile_and_export(device: torch.device) -> None:
    class Edge(torch.nn.Module):
        def forward(self, lp: Tensor, anomalous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return tuple(boundary(2 * lp, anomalous, beta=0.2, impl="triton"))

    lp, anomalous = values("random", 333).to(device), (torch.arange(333) % 4 == 0).to(device)
    compiled = torch.compile(Edge(), fullgraph=True, backend="aot_eager")
    require_equal(compiled(lp, anomalous), 2 * lp, anomalous, 0.2, 0.1, 10.0)
    exported = torch.export.export(Edge(), (lp, anomalous)).module()
    require_equal(exported(lp, anomalous), 2 * lp, anomalous, 0.2, 0.1, 10.0)
