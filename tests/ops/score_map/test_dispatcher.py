"""The anomaly map: the door, and the portable path against the oracle's explicit interpolation."""

from __future__ import annotations

import pytest
import torch

from fastbgad import reference
from fastbgad.errors import ConfigError, FeatureError
from fastbgad.ops import score_map


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (64, 48), (65, 33)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_oracle(size: tuple[int, int], batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    levels = [torch.randn(batch, h, w, dtype=dtype) - 2 for h, w in ((16, 12), (8, 6), (4, 3), (1, 1))]
    constants = torch.tensor([0.1, -0.5, 0.0, 1.0], dtype=dtype)
    fast = score_map(levels, size, constants, 3.5)
    exact = reference.score_map([lp.double() for lp in levels], size, constants.double(), 3.5)
    assert fast.anomaly_map.shape == (batch, *size)
    assert fast.anomaly_map.dtype == dtype
    assert torch.allclose(fast.anomaly_map.double(), exact, rtol=0, atol=64 * torch.finfo(dtype).eps)
    assert torch.equal(fast.image_score, fast.anomaly_map.amax(dim=(1, 2)))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(impl, dtype: torch.dtype) -> None:
    lp = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = score_map([lp], (9, 7), torch.ones(1, dtype=torch.float64), torch.tensor([2.0]), impl=impl)
    exact = reference.score_map([lp.double()], (9, 7), torch.ones(1).double(), 2.0)
    assert found.anomaly_map.dtype == found.image_score.dtype == torch.float32
    assert torch.allclose(found.anomaly_map.double(), exact, rtol=0, atol=64 * torch.finfo(torch.float32).eps)


def test_gradient_of_the_portable_path() -> None:
    levels = [torch.randn(2, h, h, dtype=torch.float64, requires_grad=True) for h in (3, 2)]
    constants = torch.zeros(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *lp: tuple(score_map(lp, (5, 4), constants, 1.0)), levels)


def test_corners_are_aligned() -> None:
    """The corners of the output are the corners of the level, and a linear ramp stays linear."""
    ramp = torch.linspace(0, 1, 5, dtype=torch.float64).expand(1, 3, 5)
    up = reference.upsample_bilinear(ramp, (7, 9))
    assert torch.allclose(up[0, 0], torch.linspace(0, 1, 9, dtype=torch.float64))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_nan_reaches_the_image_score(impl) -> None:
    lp = torch.zeros(3, 4, 4)
    lp[1, 2, 1] = torch.nan
    assert torch.isnan(score_map([lp], (8, 8), torch.zeros(1), 1.0, impl=impl).image_score).tolist() == [0, 1, 0]


def test_input_is_left_alone_and_unlikely_is_high() -> None:
    lp = torch.zeros(1, 4, 4)
    lp[0, 1, 2] = -9
    before = lp.clone()
    out = score_map([lp], (4, 4), torch.zeros(1), 1.0)
    assert torch.equal(lp, before)
    assert out.anomaly_map.argmax() == 1 * 4 + 2
    assert out.image_score == out.anomaly_map[0, 1, 2]


def test_bad_input() -> None:
    level, constant = torch.zeros(1, 2, 2), torch.zeros(1)
    with pytest.raises(FeatureError, match="constants"):
        score_map([level], (4, 4), torch.zeros(2), 0.0)
    with pytest.raises(FeatureError, match="same B"):
        score_map([level, torch.zeros(2, 2, 2)], (4, 4), torch.zeros(2), 0.0)
    with pytest.raises(FeatureError):
        score_map([], (4, 4), torch.zeros(0), 0.0)
    with pytest.raises(FeatureError, match="one type"):
        score_map([level, level.double()], (4, 4), torch.zeros(2), 0.0)
    with pytest.raises(FeatureError, match="floating point"):
        score_map([level.long()], (4, 4), constant, 0.0)
    with pytest.raises(FeatureError, match="empty"):
        score_map([level], (0, 4), constant, 0.0)
    with pytest.raises(FeatureError, match="empty"):
        score_map([torch.zeros(1, 0, 2)], (4, 4), constant, 0.0)
    with pytest.raises(FeatureError, match="one number"):
        score_map([level], (4, 4), constant, torch.zeros(2))
    with pytest.raises(FeatureError, match="one device"):
        score_map([level], (4, 4), torch.zeros(1, device="meta"), 0.0)
    with pytest.raises(ConfigError, match="impl"):
        score_map([level], (4, 4), constant, 0.0, impl="cuda")  # type: ignore[arg-type]
