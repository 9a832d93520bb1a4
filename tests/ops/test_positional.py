"""The positional condition: the oracle's values, the light object, and the separable tables' premise."""

from __future__ import annotations

import pytest
import torch

from fastbgad import reference
from fastbgad.errors import FeatureError
from fastbgad.ops import PositionalRows


def test_values_by_hand() -> None:
    p = reference.positional_encoding(8, 3, 5)
    # channels 0..3 code the column with frequencies 1 and 1e4 ** (-2/4); channels 4..7 the row
    assert p[0, 2, 4] == pytest.approx(torch.sin(torch.tensor(4.0, dtype=torch.float64)).item(), abs=1e-15)
    assert p[3, 2, 4] == pytest.approx(torch.cos(torch.tensor(0.04, dtype=torch.float64)).item(), abs=1e-15)
    assert p[4, 2, 4] == pytest.approx(torch.sin(torch.tensor(2.0, dtype=torch.float64)).item(), abs=1e-15)
    assert p[7, 2, 4] == pytest.approx(torch.cos(torch.tensor(0.02, dtype=torch.float64)).item(), abs=1e-15)


@pytest.mark.parametrize(("channels", "height", "width"), [(128, 7, 12), (8, 1, 1), (64, 33, 2)])
def test_dense_equals_oracle(channels: int, height: int, width: int) -> None:
    exact = reference.positional_encoding(channels, height, width).flatten(1).T
    rows = PositionalRows(height, width, channels=channels)
    device = torch.device("cpu")
    assert torch.allclose(rows.dense(height * width, torch.float64, device), exact, rtol=0, atol=1e-13)
    twice = rows.dense(2 * height * width, torch.float64, device)
    assert torch.equal(twice[: height * width], twice[height * width :])
    index = torch.randint(0, height * width, (19,))
    picked = PositionalRows(height, width, index, channels=channels).dense(19, torch.float64, device)
    assert torch.allclose(picked, exact[index], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PositionalRows(0, 3),
        lambda: PositionalRows(2, 3, channels=6),
        lambda: PositionalRows(2, 3, torch.zeros(4)),
        lambda: PositionalRows(2, 3, torch.zeros(2, 2, dtype=torch.int64)),
    ],
)
def test_bad_input(make) -> None:
    with pytest.raises(FeatureError):
        make()
