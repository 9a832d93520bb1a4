"""The portable fast path of the flow: plain PyTorch, arranged so that little is computed and less is stored.

Three things make it fast; the equations stay those of `fastbgad.reference.flow`:

- the positional condition enters through two small tables, A[w] + B[h], instead of a product over its P columns;
- constants are folded once per call: 0.1 into W2 and b2, g into W_perm, the offset through W_perm;
- rows go through all coupling layers in chunks whose activations stay in the cache, one part per thread.

This is inference, which holds one chunk's activations; `portable_training` saves what its backward needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...flow_spec import FlowSpec
from ..log_likelihood.portable import log_likelihood_of_norm
from ..reused_memory import Block
from .backend import FlowCall, FlowResult
from .folded import Folded, PortableWeights, fold_flow
from .hidden_bias import Chunk, hidden_bias_of

# The hidden activations of a chunk (2.4 MB per thread in float32 for C = 40) should stay in the cache.
TILES_PER_THREAD = 8
TILE_ROWS = 256


def most_tiles(device: torch.device) -> int:
    """Return how many tiles of rows go through the layers at once: on a CPU several per thread, else one.

    A batched product is shared among threads by tiles, much as element-wise operations are: most of what a thread reads
    it wrote itself. A single large product is shared by columns or by rows, as suits its shape, and its operands come
    from another core's cache: on 2 cores, tiles take two thirds of the time.
    """
    return TILES_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else 1


def prepare(call: FlowCall) -> PortableWeights:
    """Return the weights of a call with their constants folded in."""
    return fold_flow(call.layers, call.spec, call.positions, call.dtype)


@torch.no_grad()
def infer(call: FlowCall, prepared: object = None) -> FlowResult:
    """Return lp [N], log_det [N] and z [N, C] if asked, holding the activations of one chunk of rows at a time."""
    call = call.gathered()
    x, spec, positions, dense = call.x.to(call.dtype), call.spec, call.positions, call.dense
    if not (isinstance(prepared, PortableWeights) and prepared.serves(positions, call.dtype)):
        prepared = prepare(call)
    bias = hidden_bias_of(positions, None if dense is None else dense.to(call.dtype), x)
    tiles = most_tiles(x.device)
    log_g = torch.stack([layer.log_g for layer in prepared.layers]).sum()
    lp, log_det = x.new_empty(len(x)), x.new_empty(len(x))
    z = torch.empty_like(x) if call.options.return_z else None
    scratch: Scratch | None = None
    for chunk in bias.chunks(len(x), call.options.chunk_rows or tiles * TILE_ROWS, tiles):
        if scratch is None or not scratch.fits(chunk):
            scratch = Scratch(chunk, spec, x)
        here = slice(chunk.start, chunk.stop)
        scratch.load(x[here])
        for layer in prepared.layers:
            bias.fill(layer, chunk, scratch.hidden)
            scratch.carry(layer, spec.clamp)
        torch.sum(scratch.scale_sum, dim=1, out=log_det[here].view(chunk.tiles, -1))
        log_det[here].add_(log_g)
        lp[here] = log_likelihood_of_norm(scratch.squared_norm().view(-1), log_det[here], spec.channels)
        if z is not None:
            z[here] = scratch.state.rows.reshape(-1, spec.channels)
    return lp, log_det, z


class State(NamedTuple):
    """State of a chunk of T tiles of n rows between two layers, and views of it."""

    all: Tensor  # [T, C, n]
    rows: Tensor  # [T, n, C]
    passive_rows: Tensor  # [T, n, C1], x1
    active: Tensor  # [T, C2, n], x2

    @staticmethod
    def of(chunk: Chunk, spec: FlowSpec, like: Tensor) -> State:
        state = like.new_empty(chunk.tiles, spec.channels, chunk.tile_rows)
        rows, c1 = state.transpose(1, 2), spec.passive_channels
        return State(state, rows, rows[:, :, :c1], state[:, c1:])


class Scratch:
    """Activations of one chunk at inference, used by all layers and all chunks of that size."""

    def __init__(self, chunk: Chunk, spec: FlowSpec, like: Tensor) -> None:
        tiles, rows, c2 = chunk.tiles, chunk.tile_rows, spec.active_channels
        self.state, self.following = State.of(chunk, spec, like), State.of(chunk, spec, like)
        self.block = Block(tiles * rows * spec.hidden_channels, like)
        self.hidden = self.block.view(tiles, rows, spec.hidden_channels)
        self.hidden_columns = self.hidden.transpose(1, 2)
        self.a = like.new_empty(tiles, 2 * c2, rows)
        self.s, self.shift = self.a[:, :c2], self.a[:, c2:]
        self.scale_sum = like.new_empty(tiles, c2, rows)

    def fits(self, chunk: Chunk) -> bool:
        """Return whether a chunk has this size."""
        return self.hidden.shape[:2] == (chunk.tiles, chunk.tile_rows)

    def load(self, x: Tensor) -> None:
        """Start with the rows of a chunk [T * n, C]."""
        self.state.rows.copy_(x.view(self.state.rows.shape))
        self.scale_sum.zero_()

    def squared_norm(self) -> Tensor:
        """Return |z|^2 of the state of every row [T, n]; the state is lost."""
        return torch.mul(self.state.all, self.state.all, out=self.following.all).sum(dim=1)

    def carry(self, layer: Folded, clamp: float) -> None:
        """Apply one coupling layer; `hidden` holds its bias."""
        state, s, tiles = self.state, self.s, len(self.a)
        self.hidden.baddbmm_(state.passive_rows, layer.w1x.expand(tiles, -1, -1)).relu_()
        torch.bmm(layer.w2.expand(tiles, -1, -1), self.hidden_columns, out=self.a).add_(layer.b2)
        s.sigmoid_().mul_(2 * clamp).sub_(clamp)
        self.scale_sum.add_(s)
        torch.addcmul(self.shift, state.active, s.exp_(), out=state.active)  # y = [x1, x2 exp(s) + a_t], in place
        layer.permute(state.all, out=self.following.all)
        self.state, self.following = self.following, state
