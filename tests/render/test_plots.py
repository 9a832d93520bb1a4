"""Painting over photographs, and charts as inline SVG."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from fastbgad.errors import DataError, FeatureError, MissingDependencyError
from fastbgad.render import plots
from fastbgad.render.plots import (
    decision_contour,
    heat_colors,
    heat_overlay,
    history_chart,
    likelihood_chart,
    mask_contour,
)

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (20, 31, 3), dtype=np.uint8)


def luminance(colors: np.ndarray) -> np.ndarray:
    return colors @ np.array([0.2126, 0.7152, 0.0722])


def test_heat_colors_rise_in_lightness_and_hit_their_anchors():
    colors = heat_colors(np.linspace(0, 1, 8 * 32 + 1))
    assert colors.dtype == np.uint8
    assert (np.diff(luminance(colors.astype(float))) > -1).all()  # rounding may cost one step
    np.testing.assert_array_equal(colors[::32], plots.HEAT_COLORS)
    np.testing.assert_array_equal(heat_colors(np.array([-3.0, 7.0])), plots.HEAT_COLORS[:: len(plots.HEAT_COLORS) - 1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_heat_overlay_follows_the_scores(dtype):
    scores = np.tile(np.linspace(-1, 3, 31), (20, 1)).astype(dtype)
    flat = np.full_like(PHOTO, 128)
    painted = heat_overlay(flat, scores, 0.0, 2.0)
    assert painted.shape == flat.shape
    assert painted.dtype == np.uint8
    light = luminance(painted[0].astype(float))
    # Outside the range the color stays that of its end; inside, different scores look different.
    assert (painted[0, scores[0] <= 0] == painted[0, 0]).all()
    assert (painted[0, scores[0] >= 2] == painted[0, -1]).all()
    inside = (scores[0] > 0) & (scores[0] < 2)
    assert len(np.unique(painted[0, inside], axis=0)) == inside.sum()
    assert light[-1] > light[0]


def test_heat_overlay_shows_the_photograph_and_survives_a_flat_map():
    painted = heat_overlay(PHOTO, np.zeros((20, 31)), 0.0, 0.0)
    gray = PHOTO.astype(float) @ [0.299, 0.587, 0.114]
    assert np.corrcoef(gray.ravel(), painted.sum(axis=2).ravel())[0, 1] > 0.99


def test_mask_contour_paints_the_border_only():
    mask = np.zeros((20, 31), dtype=bool)
    mask[5:12, 8:20] = True
    before = PHOTO.copy()
    painted = mask_contour(PHOTO, mask.astype(np.uint8) * 255)
    np.testing.assert_array_equal(PHOTO, before)
    changed = (painted != PHOTO).any(axis=2)
    border = mask.copy()
    border[6:11, 9:19] = False
    np.testing.assert_array_equal(changed, border)
    assert (painted[border] == plots.GROUND_TRUTH_COLOR).all()
    np.testing.assert_array_equal(mask_contour(PHOTO, np.zeros_like(mask)), PHOTO)


def test_decision_contour_tells_margin_from_anomalous():
    decision = np.zeros((20, 31), dtype=np.uint8)
    decision[2:18, 2:28] = 1
    decision[6:14, 8:20] = 2
    painted = decision_contour(PHOTO, decision)
    np.testing.assert_array_equal(painted[decision == 0], PHOTO[decision == 0])
    assert (painted[2, 2:28] == plots.MARGIN_COLOR).all()
    assert (painted[6, 8:20] == plots.ANOMALOUS_COLOR).all()
    expected = 0.68 * PHOTO[10, 14] + 0.32 * np.array(plots.ANOMALOUS_COLOR)
    np.testing.assert_allclose(painted[10, 14], expected, atol=0.5)


def test_a_defect_at_the_edge_has_no_line_along_the_edge():
    mask = np.zeros((20, 31), dtype=bool)
    mask[:6] = True
    changed = (mask_contour(PHOTO, mask) != plots.GROUND_TRUTH_COLOR).any(axis=2)
    assert changed[:5].all()
    assert not changed[5].any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: heat_overlay(PHOTO, np.full((20, 31), np.nan), 0, 1), FeatureError, "NaN or Inf"),
        (lambda: heat_overlay(PHOTO, np.zeros((20, 31)), 0, np.inf), FeatureError, "color range"),
        (lambda: heat_overlay(PHOTO, np.zeros((20, 31)), 1, 0), FeatureError, "color range"),
        (
            lambda: heat_overlay(PHOTO, np.zeros((31, 20)), 0, 1),
            DataError,
            r"size \[31, 20\] but its picture \[20, 31\]",
        ),
        (lambda: mask_contour(PHOTO, np.zeros((2, 2))), DataError, "the mask has the size"),
        (lambda: decision_contour(PHOTO[..., 0], np.zeros((20, 31))), DataError, r"uint8 \[H, W, 3\]"),
        (lambda: decision_contour(PHOTO / 255.0, np.zeros((20, 31))), DataError, "not float64"),
    ],
)
def test_bad_pictures(call, error, message):
    with pytest.raises(error, match=message):
        call()


def assert_inline_svg(svg: str) -> None:
    """Well-formed, without addresses from outside, and every reference inside it resolves."""
    tree = ET.fromstring(svg)
    assert tree.tag == "svg"
    assert tree.get("role") == "img"
    assert "http" not in svg
    ids = {node.get("id") for node in tree.iter() if node.get("id")}
    uses = {node.get("clip-path", "")[5:-1] for node in tree.iter() if node.get("clip-path")}
    uses |= {node.get("href", "")[1:] for node in tree.iter() if node.get("href")}
    assert uses <= ids


def test_likelihood_chart_draws_both_boundaries():
    normal, anomalous = RNG.normal(-0.2, 0.05, 500), RNG.normal(-0.6, 0.2, 60)
    chart = likelihood_chart('level "1" & <2>', normal, anomalous, -0.3, -0.4)
    assert_inline_svg(chart.svg)
    assert "bₙ" in chart.svg
    assert "bₐ" in chart.svg
    assert [label for label, _ in chart.legend] == ["normal", "anomalous", "margin"]
    assert "var(--margin)" in chart.svg
    without = likelihood_chart("level", normal, np.empty(0), -0.3, None)
    assert "bₐ" not in without.svg
    assert [label for label, _ in without.legend] == ["normal"]


def test_likelihood_chart_says_what_it_leaves_out():
    normal = np.concatenate([RNG.normal(size=997), [np.nan, np.inf, -1e6]])
    chart = likelihood_chart("level", normal, np.empty(0), 0.0, None)
    assert "2 values that are NaN or Inf are left out" in chart.note
    assert "patches lie further left" in chart.note
    empty = likelihood_chart("level", np.array([np.nan]), np.empty(0), 0.0, None)
    assert empty.svg == ""
    assert "No finite log-likelihoods" in empty.note
    assert likelihood_chart("level", np.zeros(4), np.zeros(4), 0.0, -0.1).svg  # one value only: still a chart


def test_history_chart_takes_what_is_there():
    history = [{"pass": s, "loss": 1 / (s + 1), "loss_a": 0.5, "lr": 0.1, "b_n_0": -0.5} for s in range(50)]
    history[3]["loss"] = float("nan")
    del history[4]["loss_a"]
    chart = history_chart("Loss", history, ["loss"])
    assert_inline_svg(chart.svg)
    assert [label for label, _ in chart.legend] == ["total", "semi-push"]
    assert chart.note == "Values that are NaN or Inf are left out: loss."
    assert [label for label, _ in history_chart("B", history, ["b_n", "b_a"]).legend] == ["b_n, level 1"]


@pytest.mark.parametrize("history", [[], [{}], [{"pass": 1.0}], [{"loss": float("nan")}]])
def test_history_chart_without_anything(history):
    chart = history_chart("Loss", history, ["loss"])
    assert chart.svg == ""
    assert chart.note == "Nothing was recorded."


def test_long_histories_are_thinned_to_means():
    history = [{"pass": float(s), "loss": float(s % 2)} for s in range(20_000)]
    chart = history_chart("Loss", history, ["loss"])
    assert "mean of 67 records" in chart.note
    assert len(chart.svg) < 60_000
    values = plots._block_means(np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan, 7.0]), 2)
    np.testing.assert_array_equal(values, [2.0, 5.0, np.nan, 7.0])


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"matplotlib: pip install 'fastbgad\[report\]'"):
        history_chart("Loss", [{"loss": 1.0}], ["loss"])
