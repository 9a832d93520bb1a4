"""The former name of `fastbgad.predict` still works, and says so."""

from __future__ import annotations

import importlib
import sys

import pytest

import fastbgad


def test_the_former_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastbgad.prediction", raising=False)
    with pytest.warns(DeprecationWarning, match=r"now called fastbgad\.predict"):
        former = importlib.import_module("fastbgad.prediction")
    assert former.find_images is fastbgad.find_images
    assert former.predict_files is fastbgad.predict_files
    assert former.PredictionSummary is fastbgad.PredictionSummary
    assert former.CSV_FILE == "scores.csv"
