"""The portable flow's tiles, reused memory and kept weights; its values on awkward sizes are in test_dispatcher.py."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.errors import ConfigError
from fastbgad.flow_spec import FlowSpec
from fastbgad.ops import PositionalRows, flow_forward, reused_memory
from fastbgad.ops.flow.hidden_bias import FEWEST_TILE_ROWS, Chunk, RasterBias, row_chunks
from tests.flows import budget, double, lively_flow, relative_error, whole_error

pytestmark = pytest.mark.usefixtures("poisoned")

SPEC = FlowSpec(9, condition_channels=16, coupling_layers=3)


@pytest.mark.parametrize("tiles", [1, 2, 3, 16, 128])
@pytest.mark.parametrize("rows", [0, 1, 2, 127, 1023, 4096, 4099, 10_007])
def test_chunks_cover_every_row_once(rows: int, tiles: int) -> None:
    def check(chunks: list[Chunk]) -> None:
        assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
        for chunk in chunks:
            assert chunk.tiles * chunk.tile_rows == chunk.stop - chunk.start
            assert chunk.tiles == 1 or (chunk.tiles <= tiles and chunk.tile_rows >= FEWEST_TILE_ROWS)
            assert chunk.stop - chunk.start <= max(4096, rows % tiles)

    check(list(row_chunks(rows, 4096, tiles)))


@pytest.mark.parametrize(
    ("height", "width", "maps"), [(1, 1023, 3), (64, 64, 2), (128, 96, 1), (7, 5, 200), (5, 5000, 1)]
)
def test_chunks_of_maps_end_with_their_lines(height: int, width: int, maps: int) -> None:
    rows = height * width * maps
    chunks = list(RasterBias(PositionalRows(height, width)).chunks(rows, 4096, 16))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
    for chunk in chunks:
        assert chunk.start % width == chunk.stop % width == 0
        assert chunk.tiles * chunk.tile_rows == chunk.stop - chunk.start


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["few places", "many places", "dense", "raster"])
@pytest.mark.parametrize("rows", [256, 1023, 4099])
def test_tiles_forward_and_gradients(rows: int, kind: str) -> None:
    """Chunks of the default size, so that rows are split into tiles and a remainder; float64, where no ReLU flips."""
    torch.manual_seed(rows)
    condition: PositionalRows | Tensor
    if kind == "few places":
        condition = PositionalRows(13, 17, torch.randint(0, 13 * 17, (rows,)), channels=16)
    elif kind == "many places":
        condition = PositionalRows(90, 100, torch.randint(0, 9000, (rows,)), channels=16)
    elif kind == "dense":
        condition = torch.randn(rows, 16, dtype=torch.float64, requires_grad=True)
    else:
        condition = PositionalRows(1, rows, channels=16)
    flow = lively_flow(SPEC, dtype=torch.float64)
    x = torch.randn(rows, SPEC.channels, dtype=torch.float64, requires_grad=True)
    leaves = [p for p in flow.parameters() if p.requires_grad]
    extra = [condition] if isinstance(condition, Tensor) else []
    weights = torch.randn(3, rows, dtype=torch.float64)

    def total(lp: Tensor, log_det: Tensor, z: Tensor) -> Tensor:
        return (weights[0] * lp + weights[1] * log_det + weights[2] * z.sum(dim=1)).sum()

    out = flow_forward(x, flow.weights(), SPEC, condition, return_z=True, impl="torch")
    assert out.z is not None
    got = torch.autograd.grad(total(*out), [x, *leaves, *extra])
    exact_x = x.detach().clone().requires_grad_()
    layers = double(flow.weights())
    if isinstance(condition, Tensor):
        dense = condition.detach().clone().requires_grad_()
    else:
        dense = condition.dense(rows, torch.float64, x.device)
    z, log_det = reference.flow_forward(exact_x, layers, SPEC, dense)
    lp = reference.log_likelihood(z, log_det)
    fields = ("global_scale", "global_offset", "w1", "b1", "w2", "b2")
    exact_leaves = [exact_x, *(getattr(layer, field) for layer in layers for field in fields)]
    exact = torch.autograd.grad(total(lp, log_det, z), exact_leaves + ([dense] if extra else []))
    assert relative_error(out.log_likelihood, lp) < budget(torch.float64, 3 * SPEC.coupling_layers)
    assert relative_error(out.z, z) < budget(torch.float64, 3 * SPEC.coupling_layers)
    for value, truth in zip(got, exact, strict=True):
        assert whole_error(value.reshape(truth.shape), truth) < 1e-12
    with torch.no_grad():
        inferred = flow_forward(x, flow.weights(), SPEC, condition, return_z=True, impl="torch")
    assert relative_error(inferred.log_likelihood, lp) < budget(torch.float64, 3 * SPEC.coupling_layers)
    assert inferred.z is not None
    assert relative_error(inferred.z, z) < budget(torch.float64, 3 * SPEC.coupling_layers)


def gradient(loss: Tensor, flow: torch.nn.Module, **options: bool) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in flow.parameters() if p.requires_grad], **options))


def test_kept_activations_are_not_overwritten_while_a_graph_lives() -> None:
    """Two graphs at a time, one of them used twice; and inference in between."""
    flow, positions = lively_flow(SPEC), PositionalRows(16, 32, channels=16)
    first, second = torch.randn(2, 512, SPEC.channels)

    def loss(x: Tensor) -> Tensor:
        return flow(x, positions, rows=torch.arange(512), impl="torch").log_likelihood.sum()

    alone = [gradient(loss(x), flow) for x in (first, second)]
    kept = loss(first)
    once = gradient(kept, flow, retain_graph=True)
    with torch.inference_mode():
        loss(second)
    other = gradient(loss(second), flow)
    twice = gradient(kept, flow)
    for got, expected in ((once, alone[0]), (other, alone[1]), (twice, alone[0])):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reused_memory, "_idle", [])
    like = torch.empty(0)
    block = reused_memory.Block(1000, like)
    where = block.tensor.data_ptr()
    another = reused_memory.Block(1000, like)
    assert another.tensor.data_ptr() != where
    del block
    gc.collect()
    assert reused_memory.Block(400, like).tensor.data_ptr() != where  # more than twice as large
    assert reused_memory.Block(1000, like.double()).tensor.dtype == torch.float64
    again = reused_memory.Block(900, like)
    assert again.tensor.data_ptr() == where
    monkeypatch.setattr(reused_memory, "MOST_IDLE_BYTES", 3000)
    del again, another
    gc.collect()
    assert sum(t.nbytes for t in reused_memory._idle) <= 3000


def test_memory_made_in_inference_mode_serves_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reused_memory, "_idle", [])
    with torch.inference_mode():
        reused_memory.Block(100, torch.empty(0))
    gc.collect()
    (block,) = reused_memory._idle
    assert not block.is_inference()


def test_frozen_flow_keeps_its_folded_weights() -> None:
    flow = lively_flow(SPEC).requires_grad_(False)
    x, positions = torch.randn(300, SPEC.channels), PositionalRows(15, 20, channels=16)
    expected = flow(x, positions, impl="torch").log_likelihood
    flow.freeze()
    for _ in range(2):
        assert torch.equal(flow(x, positions, impl="torch").log_likelihood, expected)
    assert flow._prepared is not None
    assert len(flow._prepared.values()) == 1
    with torch.no_grad():
        flow.module_list[0].global_scale += 1
    changed = flow(x, positions, impl="torch").log_likelihood
    assert not torch.equal(changed, expected)
    exact = flow(x.double(), positions, impl="reference").log_likelihood
    assert relative_error(changed, exact) < budget(torch.float32, 3 * SPEC.coupling_layers)
    # other maps and types do not take the tables that are kept
    other = flow(x, PositionalRows(20, 15, channels=16), impl="torch").log_likelihood
    assert relative_error(other, flow(x.double(), PositionalRows(20, 15, channels=16), impl="reference")[0]) < 1e-4
    wide = flow(x.double(), positions, impl="torch").log_likelihood
    assert relative_error(wide, exact) < budget(torch.float64, 3 * SPEC.coupling_layers)


@pytest.mark.parametrize("kind", ["few places", "many places", "dense", "none"])
@pytest.mark.parametrize("rows", [1, 1023, 4096])
def test_bfloat16_products_of_a_training_step(rows: int, kind: str) -> None:
    """Within the rounding of bfloat16 of float64; everything that is not a product of the subnets stays float32."""
    torch.manual_seed(rows)
    condition: PositionalRows | Tensor | None = None
    spec = SPEC if kind != "none" else replace(SPEC, condition_channels=0)
    if kind == "few places":
        condition = PositionalRows(13, 17, torch.randint(0, 13 * 17, (rows,)), channels=16)
    elif kind == "many places":
        condition = PositionalRows(90, 100, torch.randint(0, 9000, (rows,)), channels=16)
    elif kind == "dense":
        condition = torch.randn(rows, 16, requires_grad=True)
    layers = lively_flow(spec).weights()
    x = torch.randn(rows, spec.channels, requires_grad=True)
    exact_layers, exact_x, exact_condition = double(layers), x.detach().double().requires_grad_(), condition
    leaves, exact_leaves = [x], [exact_x]
    for layer, exact_layer in zip(layers, exact_layers, strict=True):
        leaves += [tensor for tensor in layer if tensor.requires_grad]
        exact_leaves += [tensor for tensor in exact_layer if tensor.requires_grad]
    if isinstance(condition, Tensor):
        exact_condition = condition.detach().double().requires_grad_()
        leaves, exact_leaves = [*leaves, condition], [*exact_leaves, exact_condition]
    out = flow_forward(x, layers, spec, condition, return_z=True, impl="torch", matmul_precision="bfloat16")
    assert out.log_likelihood.dtype == out.log_det.dtype == torch.float32
    found = torch.autograd.grad(out.log_likelihood.mean(), leaves)
    exact = flow_forward(exact_x, exact_layers, spec, exact_condition, return_z=True, impl="reference")
    expected = torch.autograd.grad(exact.log_likelihood.mean(), exact_leaves)
    # eps(bfloat16) = 2^-8; a product of two rounded operands, a sum that is rounded again, through three layers
    assert whole_error(out.log_likelihood, exact.log_likelihood) < 0.5 * 2**-8
    # ReLU flips where a hidden unit is near zero, which is what is left beyond rounding
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert whole_error(ours, theirs) < 12 * 2**-8
    # and it is not float32 in disguise
    exactly = flow_forward(x, layers, spec, condition, impl="torch")
    assert not torch.equal(exactly.log_likelihood, out.log_likelihood)
    # without gradients nothing is rounded
    with torch.no_grad():
        inferred = flow_forward(x, layers, spec, condition, impl="torch", matmul_precision="bfloat16")
        usual = flow_forward(x, layers, spec, condition, impl="torch")
    assert torch.equal(inferred.log_likelihood, usual.log_likelihood)


def test_the_kernels_have_no_bfloat16() -> None:
    flow = lively_flow(SPEC)
    with pytest.raises(ConfigError, match='use matmul_precision="float16" or "float32"'):
        flow_forward(
            torch.randn(4, 9), flow.weights(), SPEC, torch.randn(4, 16), impl="triton", matmul_precision="bfloat16"
        )
