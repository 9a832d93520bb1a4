"""Settings of the tests of accelerated flows."""

from __future__ import annotations

import pytest

from fastbgad.compat.freia import acceleration


@pytest.fixture
def few_rows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make calls of few rows run the accelerated forward too."""
    monkeypatch.setattr(acceleration, "FEWEST_TRAINING_ROWS", 0)
