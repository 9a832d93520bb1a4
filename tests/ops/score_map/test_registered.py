"""The anomaly map's kernel against the oracle in float64, and its registration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.errors import BackendError
from fastbgad.ops import score_map
from fastbgad.ops.score_map import ScoreMap
from fastbgad.ops.score_map.registered import score_map_op

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = ((16, 12), (8, 6), (4, 3), (1, 1))
CONSTANTS = (0.1, -0.5, 0.0, 1.0)
EPS = torch.finfo(torch.float32).eps


def make_levels(batch: int, device: torch.device, dtype: torch.dtype = torch.float32, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [(3 * torch.randn(batch, h, w, generator=generator) - 2).to(device, dtype) for h, w in SHAPES[:count]]


def check(found: ScoreMap, levels: list[Tensor], size: tuple[int, int], level_max: Tensor, offset: float) -> None:
    """Within a few roundings of the largest likelihood, and a maximum that is exactly that of the map."""
    exact = reference.score_map([lp.double() for lp in levels], size, level_max.double(), offset)
    largest = sum(float(torch.exp(lp.double() - m).max()) for lp, m in zip(levels, level_max, strict=True))
    assert found.anomaly_map.shape == exact.shape
    assert found.anomaly_map.dtype == found.image_score.dtype == torch.float32
    # exp rounds its argument (up to 2^3) and its result; the rest is a handful of products and sums.
    assert torch.allclose(found.anomaly_map.double(), exact, rtol=0, atol=24 * EPS * (largest + abs(offset)))
    assert torch.equal(found.image_score, found.anomaly_map.amax(dim=(1, 2)))


@pytest.mark.equivalence
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (64, 48), (65, 33)])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_oracle(size: tuple[int, int], batch: int, device: torch.device) -> None:
    levels = make_levels(batch, device)
    level_max = torch.tensor(CONSTANTS, device=device)
    check(score_map(levels, size, level_max, 3.5, impl="triton"), levels, size, level_max, 3.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_half_precision_input(dtype: torch.dtype, count: int, device: torch.device) -> None:
    levels = make_levels(2, device, dtype, count)
    level_max = torch.tensor(CONSTANTS[:count], device=device)
    offset = torch.tensor([2.0], device=device, dtype=torch.float64)
    check(score_map(levels, (19, 70), level_max.double(), offset, impl="triton"), levels, (19, 70), level_max, 2.0)


def test_levels_that_are_not_contiguous_and_larger_than_the_map(device: torch.device) -> None:
    levels = [lp.transpose(1, 2) for lp in make_levels(2, device)]
    level_max = torch.tensor(CONSTANTS, device=device)
    check(score_map(levels, (5, 11), level_max, 0.0, impl="triton"), levels, (5, 11), level_max, 0.0)


def test_source_places_are_exact(device: torch.device) -> None:
    """A pixel that falls on a patch is that patch alone, to the bit; a quotient in floating point would miss some."""
    zero = torch.zeros(1, device=device)
    for patches, step in ((13, 7), (50, 49), (97, 3)):
        lp = torch.randn(1, 1, patches, device=device)
        enlarged = score_map([lp], (1, (patches - 1) * step + 1), zero, 0.0, impl="triton").anomaly_map
        assert torch.equal(enlarged[..., ::step], score_map([lp], (1, patches), zero, 0.0, impl="triton").anomaly_map)


def test_places_whose_products_pass_32_bits(device: torch.device) -> None:
    from fastbgad.kernels.score_map import score_map as launch

    lp = torch.randn(1, 1, 60_001, device=device)
    wide_tiles = {"TH": 1, "TW": 8192, "num_warps": 8}
    zero = torch.zeros(1, device=device)
    for width in (60_001, 120_001):
        anomaly_map, _ = launch([lp], (1, width), zero, zero, wide_tiles)
        assert torch.allclose(anomaly_map[..., :: width // 60_000], -torch.exp(lp), rtol=16 * EPS, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_spread_as_in_the_oracle(value: float, device: torch.device) -> None:
    """Steps of 4 pixels: the float64 oracle's places are exact too, so both touch the same pixels."""
    lp = torch.zeros(3, 5, 17, device=device)
    lp[1, 2, 3] = value
    found = score_map([lp], (17, 65), torch.zeros(1, device=device), 1.0, impl="triton")
    exact = reference.score_map([lp.double()], (17, 65), torch.zeros(1, device=device).double(), 1.0)
    assert torch.allclose(found.anomaly_map.double(), exact, equal_nan=True)
    torch.testing.assert_close(found.image_score.double(), exact.amax(dim=(1, 2)), equal_nan=True)


def test_twice_the_same_bits(device: torch.device) -> None:
    levels, level_max = make_levels(3, device), torch.tensor(CONSTANTS, device=device)
    first, second = (score_map(levels, (33, 70), level_max, 3.5, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_image_scores_the_same_alone_and_in_a_batch(device: torch.device) -> None:
    levels, level_max = make_levels(3, device), torch.tensor(CONSTANTS, device=device)
    together = score_map(levels, (33, 70), level_max, 3.5, impl="triton")
    alone = score_map([lp[1:2] for lp in levels], (33, 70), level_max, 3.5, impl="triton")
    assert torch.equal(together.anomaly_map[1:2], alone.anomaly_map)
    assert torch.equal(together.image_score[1:2], alone.image_score)


def test_no_images(device: torch.device) -> None:
    found = score_map([torch.zeros(0, 2, 2, device=device)], (4, 5), torch.zeros(1, device=device), 0.0, impl="triton")
    assert found.anomaly_map.shape == (0, 4, 5)
    assert found.image_score.shape == (0,)


def test_gradients_take_the_portable_path(device: torch.device) -> None:
    lp = torch.randn(1, 2, 2, device=device, requires_grad=True)
    zero = torch.zeros(1, device=device)
    score_map([lp], (4, 4), zero, 0.0).image_score.sum().backward()
    assert lp.grad is not None
    with pytest.raises(BackendError, match="gradient"):
        score_map([lp], (4, 4), zero, 0.0, impl="triton")
    with torch.no_grad():
        assert not score_map([lp], (4, 4), zero, 0.0, impl="triton").image_score.requires_grad


def test_float64_takes_the_portable_path(device: torch.device) -> None:
    lp, zero = torch.randn(1, 2, 2, device=device, dtype=torch.float64), torch.zeros(1, device=device)
    assert score_map([lp], (4, 4), zero, 0.0).anomaly_map.dtype == torch.float64
    with pytest.raises(BackendError, match="float64"):
        score_map([lp], (4, 4), zero, 0.0, impl="triton")


def test_registration(device: torch.device) -> None:
    levels = make_levels(2, device, count=2)
    torch.library.opcheck(
        score_map_op,
        (levels, 9, 7, torch.tensor(CONSTANTS[:2], device=device), torch.zeros((), device=device)),
    )


class _Map(torch.nn.Module):
    def forward(self, first: Tensor, second: Tensor, level_max: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        return score_map([first, second], (9, 7), level_max, offset, impl="triton")


def test_compile_and_export(device: torch.device) -> None:
    arguments = (
        *make_levels(2, device, count=2),
        torch.tensor(CONSTANTS[:2], device=device),
        torch.zeros((), device=device),
    )
    expected = _Map()(*arguments)
    compiled = torch.compile(_Map(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(_Map(), arguments)
    assert any(node.target is torch.ops.fastbgad.score_map.default for node in exported.graph.nodes)
    for found in (compiled(*arguments), exported.module()(*arguments)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_traced_graph_runs_without_the_kernel(monkeypatch) -> None:
    """On a CPU without the interpreter, as where a graph exported on a GPU is loaded."""
    monkeypatch.setattr("fastbgad.ops.registration.interpreting", lambda: False)
    levels, level_max = make_levels(2, torch.device("cpu"), torch.float16), torch.tensor(CONSTANTS)
    check(ScoreMap(*score_map_op(levels, 9, 7, level_max, torch.zeros(()))), levels, (9, 7), level_max, 0.0)
