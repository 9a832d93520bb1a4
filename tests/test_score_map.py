"""The anomaly map: portable path against the oracle's explicit interpolation."""

from __future__ import annotations

import pytest
import torch

from fastbgad import reference
from fastbgad.errors import FeatureError
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
    assert fast.shape == (batch, *size)
    assert torch.allclose(fast.double(), exact, rtol=0, atol=64 * torch.finfo(dtype).eps)


def test_corners_are_aligned() -> None:
    """The corners of the output are the corners of the level, and a linear ramp stays linear."""
    ramp = torch.linspace(0, 1, 5, dtype=torch.float64).expand(1, 3, 5)
    up = reference.upsample_bilinear(ramp, (7, 9))
    assert torch.allclose(up[0, 0], torch.linspace(0, 1, 9, dtype=torch.float64))


def test_input_is_left_alone_and_unlikely_is_high() -> None:
    lp = torch.zeros(1, 4, 4)
    lp[0, 1, 2] = -9
    before = lp.clone()
    out = score_map([lp], (4, 4), torch.zeros(1), 1.0)
    assert torch.equal(lp, before)
    assert out.argmax() == 1 * 4 + 2


def test_bad_input() -> None:
    with pytest.raises(FeatureError, match="constants"):
        score_map([torch.zeros(1, 2, 2)], (4, 4), torch.zeros(2), 0.0)
    with pytest.raises(FeatureError, match="same B"):
        score_map([torch.zeros(1, 2, 2), torch.zeros(2, 2, 2)], (4, 4), torch.zeros(2), 0.0)
    with pytest.raises(FeatureError):
        score_map([], (4, 4), torch.zeros(0), 0.0)
