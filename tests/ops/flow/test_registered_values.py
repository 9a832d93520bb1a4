"""Values the flow's kernels cannot use: they show in their own row, touch no other, and the debug mode finds them."""

from __future__ import annotations

import pytest
import torch

from fastbgad.errors import FeatureError
from fastbgad.ops import PositionalRows, debug_checks
from tests.flow_problems import HEIGHT, WIDTH, Problem
from tests.flows import whole_error

pytestmark = pytest.mark.usefixtures("poisoned", "large_tiles")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_a_bad_row_touches_no_other(bad: float, device: torch.device) -> None:
    """Its log-likelihood is NaN, the others keep their bits, and it has no share in any gradient."""
    problem = Problem("positions", 63, 9, device)
    clean = problem.run().log_likelihood
    upstream = torch.randn(63, device=device)
    upstream[5] = 0
    without = problem.gradients("float16", upstream)
    problem.x[5, 3] = bad
    upstream[5] = 3.0
    out = problem.run().log_likelihood
    others = torch.arange(63, device=device) != 5
    assert torch.isnan(out[5])
    assert torch.equal(out[others], clean[others])
    for name, value in problem.gradients("float16", upstream).items():
        assert torch.isfinite(value).all()
        assert whole_error(value, without[name]) < 1e-6, name


@pytest.mark.parametrize("channels", [64, 128])
def test_what_leaves_float16_on_the_way_shows(channels: int, device: torch.device) -> None:
    """Also where every hidden unit of the next layer is off and the layer after brings the value back."""
    # A soft permutation has the same operands and would show it by itself, and so would padded hidden units: with these
    # channels there are none.
    problem = Problem("positions", 12, channels, device, layers=3, hard_permutation=True)
    passive = channels - channels // 2
    with torch.no_grad():
        for layer in problem.flow.module_list:
            layer.w_perm.copy_(torch.eye(channels))
        first, second, _ = problem.flow.module_list
        first.global_scale.fill_(0.0)
        second.subnet[0].weight[:, :passive] = -1.0
        first.global_offset[0, :passive] = 50.0
    assert torch.isfinite(problem.run().log_likelihood).all()
    with torch.no_grad():
        first.global_offset[0, 0] = 1e5
        second.global_scale.fill_(-20.0)
    assert torch.isnan(problem.run().log_likelihood).all()
    assert torch.isfinite(problem.run("float32").log_likelihood).all()


@pytest.mark.parametrize("beyond", [-1, 3 * HEIGHT * WIDTH, 2**31 - 1])
def test_an_index_out_of_range_is_nan_and_found_by_the_debug_mode(
    beyond: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem("gathered", 63, 9, device)
    clean = problem.run().log_likelihood
    assert problem.rows is not None
    problem.rows[7] = beyond
    with debug_checks(), pytest.raises(FeatureError, match=r"rows .*0, 231\)|outside \[0, 231\), first number 7"):
        problem.run()
    # On a CPU the door looks at the indices itself; a GPU is not waited for.
    monkeypatch.setattr("fastbgad.ops.flow.dispatcher._check", lambda *_: None)
    out = problem.run().log_likelihood
    assert torch.isnan(out[7])
    others = torch.arange(63, device=device) != 7
    assert torch.equal(out[others], clean[others])


def test_debug_checks(device: torch.device) -> None:
    problem = Problem("positions", 10, 9, device)
    problem.x[4, 2] = float("nan")
    with debug_checks(), pytest.raises(FeatureError, match="first in row 4"):
        problem.run()
    problem.x[4, 2] = 0.0
    with debug_checks():
        problem.run()
    assert isinstance(problem.condition, PositionalRows)
    assert problem.condition.index is not None
    problem.condition.index[3] = HEIGHT * WIDTH
    with debug_checks(), pytest.raises(FeatureError, match="first number 3, which is 77"):
        problem.run()
    problem.condition.index[3] = 0
    with torch.no_grad():
        problem.flow.module_list[1].w_perm *= 1.01
    with debug_checks(), pytest.raises(FeatureError, match="layer 1 is not orthogonal"):
        problem.run()
