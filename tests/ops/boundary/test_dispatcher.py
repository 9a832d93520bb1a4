"""The explicit boundary: portable path against the oracle and against sorting by hand, pooled over two processes."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.errors import ConfigError, FeatureError
from fastbgad.ops import boundary, spp_loss
from fastbgad.ops.spp_loss.options import SppLossOptions
from fastbgad.ops.spp_loss.portable import portable_spp_loss
from tests import ROOT


@pytest.mark.parametrize("rows", [1, 2, 63, 1023, 5000])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.05, 0.999])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("ties", [False, True])
def test_order_statistic(rows: int, beta: float, share: float, ties: bool) -> None:
    torch.manual_seed(rows)
    lp = torch.randn(rows, dtype=torch.float64)
    if ties:
        lp = lp.round()
    anomalous = torch.rand(rows) < share
    got = boundary(lp, anomalous, beta=beta, tau=0.2, normalizer=4.0)
    normal = sorted(lp[~anomalous].tolist())
    assert int(got.n_normal) == len(normal)
    if not normal:
        assert math.isnan(got.b_n)
        return
    assert float(got.b_n) == normal[int(len(normal) * beta)] / 4.0
    assert float(got.b_a) == pytest.approx(float(got.b_n) - 0.2, abs=1e-15)
    oracle = boundary(lp, anomalous, beta=beta, tau=0.2, normalizer=4.0, impl="reference")
    assert torch.equal(got.b_n, oracle.b_n)
    assert torch.equal(got.b_a, oracle.b_a)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_no_normals_is_nan_not_a_crash(impl: str, rows: int) -> None:
    got = boundary(torch.randn(rows), torch.ones(rows, dtype=torch.bool), impl=impl)
    assert math.isnan(got.b_n)
    assert math.isnan(got.b_a)
    assert int(got.n_normal) == 0


def test_is_detached() -> None:
    lp = torch.randn(9, requires_grad=True)
    assert not boundary(lp, torch.zeros(9, dtype=torch.bool)).b_n.requires_grad


@pytest.mark.parametrize("bad", [{"beta": 1.0}, {"beta": -0.1}, {"tau": -1.0}, {"normalizer": 0.0}])
def test_bad_options(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        boundary(torch.zeros(3), torch.zeros(3, dtype=torch.bool), **bad)


def test_bad_mask() -> None:
    with pytest.raises(FeatureError, match="bool"):
        boundary(torch.zeros(3), torch.zeros(3))
    with pytest.raises(FeatureError, match=r"both be \[N\]"):
        boundary(torch.zeros(3), torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_and_infinity_are_ordered_as_by_sort(beta: float, dtype: torch.dtype) -> None:
    lp = torch.tensor([math.nan, 2.0, -math.inf, math.inf, -math.nan, 0.5, -0.0, 7.0, 8.0, 9.0], dtype=dtype)
    anomalous = torch.tensor([False] * 7 + [True] * 3)
    got = boundary(lp, anomalous, beta=beta)
    oracle = boundary(lp, anomalous, beta=beta, impl="reference")
    assert torch.allclose(got.b_n, oracle.b_n, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_narrow_types_are_cast_up(impl: str, dtype: torch.dtype) -> None:
    lp, anomalous = torch.randn(77).to(dtype), torch.arange(77) % 3 == 0
    got = boundary(lp, anomalous, beta=0.2, impl=impl)
    assert got.b_n.dtype == torch.float32
    assert torch.equal(got.b_n, boundary(lp.float(), anomalous, beta=0.2).b_n)


def test_the_oracle_knows_no_group() -> None:
    with pytest.raises(ConfigError, match="group"):
        boundary(torch.zeros(3), torch.zeros(3, dtype=torch.bool), impl="reference", group=object())


# Pooled over two processes -------------------------------------------------------------------------------------------

POOLED = {"beta": 0.05, "tau": 0.3, "normalizer": 7.0}
MODES = [("torch", torch.float32), ("torch", torch.float64), ("triton", torch.float32)]


def pooled_cases() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """name -> rows and mask of each of the two processes, float64."""
    generator = torch.Generator().manual_seed(5)

    def rows(count: int, share: float) -> tuple[Tensor, Tensor]:
        lp = 4 * torch.randn(count, dtype=torch.float64, generator=generator) - 3
        return lp, torch.rand(count, generator=generator) < share

    ties = [(lp.round(), mask) for lp, mask in (rows(300, 0.2), rows(5000, 0.2))]
    special = rows(40, 0.2)
    special[0][::3] = math.nan
    special[0][1] = -math.inf
    return {
        "uneven": [rows(5000, 0.3), rows(37, 0.3)],
        "ties": ties,
        "one without normals": [rows(11, 1.0), rows(203, 0.3)],
        "one without rows": [rows(100, 0.3), rows(0, 0.0)],
        "none with normals": [rows(9, 1.0), rows(70, 1.0)],
        "no rows": [rows(0, 0.0), rows(0, 0.0)],
        "NaN and infinity": [special, rows(3, 0.0)],
    }


def pooled_worker(rank: int, folder: str) -> None:
    """Runs every case in every mode as one of two processes and saves what it got."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for name, parts in pooled_cases().items():
        for impl, dtype in MODES:
            lp, anomalous = parts[rank][0].to(device, dtype), parts[rank][1].to(device)
            edge = boundary(lp, anomalous, impl=impl, group=group, **POOLED)
            loss = spp_loss(lp, anomalous, 3, impl=impl, group=group, **POOLED)
            found[name, impl, dtype] = [t.cpu() for t in edge], [t.cpu() for t in loss]
    alone = torch.distributed.new_group([0])
    if rank == 1:
        with pytest.raises(ConfigError, match="member"):
            boundary(torch.zeros(3), torch.zeros(3, dtype=torch.bool), group=alone)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("pooled")
    root = ROOT
    script = "from tests.ops.boundary.test_dispatcher import pooled_worker; pooled_worker({}, {!r})"
    runs = [script.format(rank, str(folder)) for rank in (0, 1)]
    processes = [subprocess.Popen([sys.executable, "-c", run], cwd=root) for run in runs]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", pooled_cases())
@pytest.mark.parametrize(("impl", "dtype"), MODES, ids=str)
def test_pooled_equals_the_boundary_of_all_rows(pooled: list[dict], name: str, impl: str, dtype: torch.dtype) -> None:
    parts = [(lp.to(dtype), mask) for lp, mask in pooled_cases()[name]]
    lp, anomalous = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    expected = (*reference.boundary(lp, anomalous, *POOLED.values()), (~anomalous).sum())
    for rank in range(2):
        edge, loss = pooled[rank][name, impl, dtype]
        for value, truth in zip(edge, expected, strict=True):
            assert value.dtype == truth.dtype
            assert torch.allclose(value, truth, rtol=0, atol=0, equal_nan=True)
        # The loss of a process: its own rows under the boundary of all.
        options = SppLossOptions(**POOLED, lam=1.0, ml_form="logsigmoid", reduction="mean", focal=False, push=True)
        local, _ = portable_spp_loss(*parts[rank], 3, *expected[:2], options)
        for field, value, truth in zip(local._fields, loss, local, strict=True):
            close = {"rtol": 1e-5, "atol": 1e-6} if value.is_floating_point() else {"rtol": 0, "atol": 0}
            assert torch.allclose(value, truth, equal_nan=True, **close), field
