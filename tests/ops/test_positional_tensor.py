"""The positional condition as a light tensor: what keeps its places, and that its values are always right."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastbgad import positional_rows, reference
from fastbgad.errors import FeatureError
from fastbgad.ops.positional_tensor import PositionalEncoding, positional_map, positions_of

HEIGHT, WIDTH, CHANNELS, BATCH = 3, 5, 8, 2
AREA = HEIGHT * WIDTH


def exact() -> Tensor:
    return reference.positional_encoding(CHANNELS, HEIGHT, WIDTH).float()


def rows() -> PositionalEncoding:
    return positional_rows(HEIGHT, WIDTH, channels=CHANNELS)


def exact_rows() -> Tensor:
    return exact().flatten(1).T


def test_values() -> None:
    assert torch.equal(positional_map(CHANNELS, HEIGHT, WIDTH).values(), exact())
    assert torch.equal(rows() + 0, exact_rows())
    index = torch.tensor([7, 0, 7, 14])
    some = positional_rows(HEIGHT, WIDTH, index, channels=CHANNELS)
    assert some.shape == (4, CHANNELS)
    assert torch.equal(some + 0, exact_rows()[index])
    double = positional_rows(HEIGHT, WIDTH, index, channels=CHANNELS, dtype=torch.float64)
    assert torch.allclose(
        double + 0, reference.positional_encoding(CHANNELS, HEIGHT, WIDTH).flatten(1).T[index], rtol=0
    )


# The ways the official BGAD, CFLOW-AD and anomalib turn a map's encoding into rows.
PREPARATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "BGAD": lambda p: p.to("cpu").unsqueeze(0).repeat(BATCH, 1, 1, 1).permute(0, 2, 3, 1).reshape(-1, CHANNELS),
    "CFLOW-AD": lambda p: (
        p.unsqueeze(0)
        .repeat(BATCH, 1, 1, 1)
        .reshape(BATCH, CHANNELS, AREA)
        .transpose(1, 2)
        .reshape(BATCH * AREA, CHANNELS)
    ),
    "expand": lambda p: (
        p[None].expand(BATCH, -1, -1, -1).permute(0, 2, 3, 1).flatten(0, 2)
        if not isinstance(p, PositionalEncoding)
        else p.unsqueeze(0).expand(BATCH, -1, -1, -1).permute(0, 2, 3, 1).flatten(0, 2)
    ),
}


@pytest.mark.parametrize("how", PREPARATIONS)
def test_usual_preparations_keep_whole_maps(how: str) -> None:
    found = PREPARATIONS[how](positional_map(CHANNELS, HEIGHT, WIDTH))
    where = positions_of(found)
    assert where is not None
    assert (where.height, where.width, where.index) == (HEIGHT, WIDTH, None)
    expected = PREPARATIONS[how](exact())
    assert torch.equal(found + 0, expected)
    perm = torch.randperm(len(expected))
    chosen = found[perm[torch.arange(3, 17)]]
    where = positions_of(chosen)
    assert where is not None
    assert torch.equal(where.index, perm[3:17] % AREA)  # type: ignore[arg-type]
    assert torch.equal(chosen + 0, expected[perm[3:17]])


KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "half": lambda t: t.half().float(),
    "contiguous": lambda t: t.contiguous().detach(),
    "clone": lambda t: t.clone(),
    "slice": lambda t: t[2:9],
    "mask": lambda t: t[torch.arange(AREA) % 2 == 0],
    "list": lambda t: t[[3, 1, 1]],
    "negative": lambda t: t[torch.tensor([-1, -3])],
    "index_select": lambda t: t.index_select(0, torch.tensor([5, 2])),
    "repeat": lambda t: t.repeat(3, 1),
    "view": lambda t: t.view(HEIGHT, WIDTH, CHANNELS).reshape(-1, CHANNELS),
    "swap axes": lambda t: t.view(HEIGHT, WIDTH, CHANNELS).transpose(0, 1).reshape(-1, CHANNELS),
}


@pytest.mark.parametrize("how", KEEPING)
def test_keeps_its_places(how: str) -> None:
    found, expected = KEEPING[how](rows()), KEEPING[how](exact_rows())
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    where = positions_of(found)
    assert where is not None
    assert torch.allclose(where.dense(len(found), torch.float32, found.device), expected, atol=1e-3)
    assert torch.equal(found + 0, exact_rows() if how == "half" else expected)  # places know nothing of rounding


LOSING: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic": lambda t: 2 * t + 1,
    "cat": lambda t: torch.cat([t, t]),
    "stack": lambda t: torch.stack([t, t]),
    "columns": lambda t: t[:, 2:4],
    "transposed": lambda t: t.T @ t,
    "linear": lambda t: torch.nn.functional.linear(t, torch.ones(3, CHANNELS)),
    "split channels": lambda t: t.reshape(AREA, 2, CHANNELS // 2),
    "merged": lambda t: t.reshape(-1),
    "one row": lambda t: t[0],
    "unbind": lambda t: t.unbind(0)[3],
    "integer": lambda t: (10 * t).long(),
    "new axis": lambda t: t[None],
}


@pytest.mark.parametrize("how", LOSING)
def test_everything_else_sees_values(how: str) -> None:
    found, expected = LOSING[how](rows()), LOSING[how](exact_rows())
    assert type(found) is Tensor
    assert torch.allclose(found, expected, rtol=1e-6)


def test_repeating_within_a_map_is_not_whole_maps() -> None:
    tall = positional_map(CHANNELS, HEIGHT, WIDTH).repeat(1, 1, 2).permute(1, 2, 0).reshape(-1, CHANNELS)
    where = positions_of(tall)
    assert where is not None
    assert where.index is not None
    assert torch.equal(tall + 0, exact().repeat(1, 1, 2).permute(1, 2, 0).reshape(-1, CHANNELS))


def test_writing_makes_it_ordinary() -> None:
    def whole(t: Tensor) -> None:
        t += 1

    def one(t: Tensor) -> None:
        t[0] = 5

    def through_a_view(t: Tensor) -> None:
        row = t[3]
        row.mul_(2)

    def out(t: Tensor) -> None:
        torch.add(exact_rows(), 2, out=t)

    for write in (whole, one, through_a_view, out):
        found, expected = rows(), exact_rows().clone()
        aside = found.clone()
        write(found)
        write(expected)
        assert positions_of(found) is None, write.__name__
        assert torch.equal(found + 0, expected)
        assert torch.equal(found[2:4] + 0, expected[2:4])
        assert torch.equal(aside + 0, exact_rows())
        assert torch.equal(copy.deepcopy(found) + 0, expected)
        assert torch.equal(pickle.loads(pickle.dumps(found)) + 0, expected)


def test_a_condition_that_wants_a_gradient_is_ordinary() -> None:
    found = rows()
    found.requires_grad_()
    assert found.requires_grad
    assert positions_of(found) is None
    found.square().sum().backward()
    assert torch.equal(found.grad, 2 * exact_rows())


def test_copies() -> None:
    found = rows()[torch.tensor([4, 2])]
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert isinstance(twin, PositionalEncoding)
        assert torch.equal(positions_of(twin).index, torch.tensor([4, 2]))  # type: ignore[union-attr, arg-type]
        assert torch.equal(twin + 0, found + 0)


def test_looks_like_a_tensor() -> None:
    found = rows()
    assert isinstance(found, Tensor)
    assert torch.is_tensor(found)
    assert (len(found), found.dim(), found.dtype, found.numel()) == (AREA, 2, torch.float32, AREA * CHANNELS)
    assert found.device.type == "cpu"
    assert not found.requires_grad
    assert found.numpy().shape == (AREA, CHANNELS)
    assert found.tolist()[1] == exact_rows().tolist()[1]
    assert repr(found) == "PositionalEncoding([15, 8], map=3x5, dtype=torch.float32, device=cpu)"
    assert found._codes is not None  # asked for above
    assert positional_rows(1000, 1000)._codes is None  # 512 MB of values that nobody asked for


def test_errors() -> None:
    with pytest.raises(FeatureError, match="multiple of 4"):
        positional_rows(3, 5, channels=6)
    with pytest.raises(FeatureError, match="multiple of 4"):
        positional_map(130, 3, 5)
    with pytest.raises(FeatureError, match="has no positions"):
        positional_rows(0, 5)
    with pytest.raises(FeatureError, match="int64"):
        positional_rows(3, 5, torch.tensor([1.0]))
    with pytest.raises(FeatureError, match=r"lie in \[0, 15\) .* not in \[-1, 20\]"):
        positional_rows(3, 5, torch.tensor([-1, 20]))
    with pytest.raises(RuntimeError, match="shape"):
        rows().reshape(7, 7)
