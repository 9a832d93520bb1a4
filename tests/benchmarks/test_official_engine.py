"""The official training loop with only its import line and `accelerate` changed ends in the same parameters."""

from __future__ import annotations

import copy

import pytest
import torch

import fastbgad
from fastbgad.compat import bgad
from fastbgad.flow_spec import FlowSpec
from fastbgad.ops.positional_tensor import PositionalEncoding

from ..flows import freia_flow, whole_error
from ..official_loop import plain, train_level

STEPS, CHUNK, SIDE, BATCH = 20, 256, 16, 4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_same_parameters_after_twenty_steps(dtype: torch.dtype, tolerance: float) -> None:
    original = freia_flow(FlowSpec(12, 128, 4)).to(dtype)
    fast = fastbgad.accelerate(copy.deepcopy(original))
    generator = torch.Generator().manual_seed(0)
    seen: list[type] = []
    fast.register_forward_pre_hook(lambda _, inputs: seen.append(type(inputs[1][0])))
    results = []
    for functions, decoder in ((plain, original), (bgad, fast)):
        generator.manual_seed(0)
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(decoder.parameters(), lr=2e-4)
        losses: list[float] = []
        while len(losses) < STEPS:
            maps = torch.randn(BATCH, 12, SIDE, SIDE, generator=generator).to(dtype)
            masks = (torch.rand(BATCH, 1, 2 * SIDE, 2 * SIDE, generator=generator) < 0.1).to(dtype)
            losses += train_level(functions, decoder, optimizer, maps, masks, CHUNK)
        results.append(losses)
    assert len(results[0]) == STEPS
    assert results[1] == pytest.approx(results[0], rel=tolerance)
    assert set(seen) == {PositionalEncoding}  # the separable path, from the official functions alone
    for found, expected in zip(fast.parameters(), original.parameters(), strict=True):
        assert whole_error(found, expected) < tolerance
