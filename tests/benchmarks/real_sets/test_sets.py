"""Parts of `benchmarks/real.py`: categories and their splits, recall at false alarms, the Gaussian, the grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from real_sets.backbones import build, features_named
from real_sets.gaussian import RIDGE, fit_gaussian, gaussian_maps
from real_sets.grid import METHODS, Run, plan, plan_convergence
from real_sets.recall import recall_at_false_alarms
from real_sets.sets import find_categories, known_count, open_set, split_set
from scipy.spatial.distance import mahalanobis
from torch.nn.functional import interpolate

from fastbgad.backbones import create_backbone
from fastbgad.errors import DataError, FeatureError, MetricError
from fastbgad.features import ImageFeatures, ImageReading
from tests.make_data import make_folder_dataset, make_mvtec


def test_categories_up_to_two_folders_deep(tmp_path: Path) -> None:
    make_mvtec(tmp_path / "mvtec", "screw")
    make_mvtec(tmp_path / "mvtec", "nut")
    make_mvtec(tmp_path / "other", "screw")
    make_mvtec(tmp_path, "alone")
    make_folder_dataset(tmp_path / "plain")
    make_mvtec(tmp_path / "too" / "deep", "hidden")
    (tmp_path / "empty").mkdir()
    found = find_categories(tmp_path)
    assert found == {
        "alone": tmp_path / "alone",
        "mvtec.screw": tmp_path / "mvtec" / "screw",
        "nut": tmp_path / "mvtec" / "nut",
        "other.screw": tmp_path / "other" / "screw",
        "plain": tmp_path / "plain",
    }
    for name, folder in found.items():
        category = open_set(name, folder)
        assert (category.name, category.root) == (name, folder)
    assert find_categories(tmp_path / "mvtec" / "screw") == {"screw": tmp_path / "mvtec" / "screw"}
    assert find_categories(tmp_path / "mvtec").keys() == {"screw", "nut"}


def test_a_folder_without_categories(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no category was found"):
        find_categories(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        find_categories(tmp_path / "nowhere")


@pytest.mark.parametrize(("per_type", "known"), [(1, 1), (2, 2), (3, 3), (12, 10)])
def test_half_of_the_anomalies_are_known_at_most(tmp_path: Path, per_type: int, known: int) -> None:
    category = open_set("widget", make_mvtec(tmp_path, per_type=per_type))  # of each of two types
    assert known_count(category) == known
    split = split_set(category, seed=1)
    assert len(split.known_anomalies) == known
    assert sum(sample.label for sample in split.test) == 2 * per_type - known
    assert split == split_set(category, seed=1)
    if per_type > 2:
        assert split != split_set(category, seed=2)


def test_a_test_without_normal_images_is_refused(tmp_path: Path) -> None:
    category = open_set("widget", make_mvtec(tmp_path))
    bare = type(category)("widget", category.root, "mvtec", category.train, tuple(s for s in category.test if s.label))
    with pytest.raises(DataError, match="no normal test image"):
        split_set(bare, 0)


def brute_force(scores: np.ndarray, labels: np.ndarray, limit: float) -> float:
    """The best recall of all thresholds below, between and above the scores."""
    found = []
    for threshold in [-np.inf, *scores]:
        alarms = scores > threshold
        if (alarms & ~labels).sum() / (~labels).sum() <= limit:
            found.append((alarms & labels).sum() / labels.sum())
    return max(found)


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.05, 0.29, 0.5, 1.0])
def test_recall_against_brute_force(limit: float) -> None:
    rng = np.random.default_rng(0)
    for normal, anomalous, values in ((1, 1, 3), (2, 8, 4), (99, 7, 20), (100, 50, 12), (101, 20, 1000), (300, 9, 40)):
        for _ in range(10):
            scores = rng.integers(0, values, normal + anomalous) / 8  # many ties
            labels = rng.permutation(np.arange(normal + anomalous) < anomalous)
            assert recall_at_false_alarms(scores, labels, limit) == brute_force(scores, labels, limit)


def test_recall_of_ties_and_of_infinite_scores() -> None:
    labels = [False] * 100 + [True] * 4
    assert recall_at_false_alarms([0.0] * 99 + [1.0] + [1.0] * 4, labels) == 1.0  # one of a hundred may alarm
    assert recall_at_false_alarms([0.0] * 98 + [1.0] * 2 + [1.0, 1.0, 2.0, 0.5], labels) == 0.25
    assert recall_at_false_alarms([0.0] * 100 + [0.0] * 4, labels) == 0.0
    assert recall_at_false_alarms([-np.inf] * 100 + [np.inf] * 4, labels) == 1.0


@pytest.mark.parametrize(
    ("scores", "labels", "limit"),
    [
        ([1.0, np.nan], [0, 1], 0.01),
        ([1.0], [1], 0.01),
        ([1.0, 2.0], [0, 0], 0.01),
        ([1.0], [0, 1], 0.01),
        ([1.0, 2.0], [0, 1], 1.5),
    ],
)
def test_recall_of_what_has_none(scores: list[float], labels: list[int], limit: float) -> None:
    with pytest.raises(MetricError):
        recall_at_false_alarms(scores, np.array(labels, dtype=bool), limit)


def test_distances_are_scipys() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)) + 100  # far from 0: sums of squares would cancel
    parts = [torch.tensor(part, dtype=torch.float32) for part in (rows[:7], rows[7:8], rows[8:])]
    rounded = torch.cat(parts).double().numpy()
    covariance = np.cov(rounded, rowvar=False)
    inverse = np.linalg.inv(covariance + RIDGE * covariance.diagonal().mean() * np.eye(5))
    wanted = [mahalanobis(row, rounded.mean(0), inverse) ** 2 / 5 for row in rounded]
    found = fit_gaussian(parts).distances(torch.cat(parts))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9)
    assert found.mean() == pytest.approx(59 / 60, rel=1e-2)


def test_channels_that_depend_on_each_other_are_no_problem() -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    gaussian = fit_gaussian([torch.cat([rows, rows[:, :1]], dim=1)])
    assert torch.isfinite(gaussian.distances(torch.ones(1, 4))).all()


@pytest.mark.parametrize("rows", [torch.ones(9, 3), torch.tensor([[0.0, torch.inf], [1.0, 2.0]])])
def test_features_without_variance_are_refused(rows: torch.Tensor) -> None:
    with pytest.raises(FeatureError, match="no finite variance"):
        fit_gaussian([rows])


def test_gaussian_maps_sum_over_levels(tmp_path: Path) -> None:
    category = open_set("widget", make_mvtec(tmp_path, normals=3, per_type=1, size=64))
    backbone = create_backbone("tf_efficientnet_lite0", weights="random")
    images = [*category.train, *category.test]
    features = ImageFeatures(backbone, (64, 64), images, category.train, reading=ImageReading(workers=0))
    features.extract(images)
    normals, test = features.slots(category.train), features.slots(category.test)
    maps, image_scores = gaussian_maps(features.store, normals, test, (64, 64))
    wanted = torch.zeros(len(test), 1, 64, 64, dtype=torch.float64)
    for level in range(3):
        rows = features.store.maps(level, normals).permute(0, 2, 3, 1).flatten(0, 2).double()
        covariance = torch.cov(rows.T) + RIDGE * torch.cov(rows.T).diagonal().mean() * torch.eye(rows.shape[1])
        centered = features.store.maps(level, test).double() - rows.mean(0)[:, None, None]
        inverse = torch.linalg.inv(covariance)
        squared = torch.einsum("nchw,cd,ndhw->nhw", centered, inverse, centered) / rows.shape[1]
        wanted += interpolate(squared[:, None], (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(maps.double(), wanted[:, 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(image_scores, maps.amax(dim=(1, 2)))


def test_the_plan() -> None:
    runs = plan(["a", "b"], ["gabor", "lite0", "lite0-raw"], [256], ["demo", "official"], list(METHODS), [0, 1], 7)
    paths = [str(run.path) for run in runs]
    assert len(paths) == len(set(paths)) == len({run.key for run in runs})
    # Of fastbgad's three methods two schedules, with the Gaussian; four peers on one kind of features.
    assert len(runs) == 2 * 2 * (3 * (3 * 2 + 1) + 4)
    assert "a/lite0-256-7-epochs/cfa-seed1.json" in paths
    assert "b/gabor-256-official/bgad-seed0.json" in paths
    assert "a/lite0-raw-256-once/gaussian-seed0.json" in paths
    assert not any("patchcore" in path and "lite0-256-once" not in path for path in paths)
    assert [run.group for run in runs] == sorted(
        [run.group for run in runs], key=[*{run.group: 0 for run in runs}].index
    )
    alone = plan(["a"], ["lite2-raw"], [64], ["demo"], ["padim"], [0], 7)
    assert [str(run.path) for run in alone] == ["a/lite2-raw-64-once/padim-seed0.json"]
    assert [str(run.path) for run in plan_convergence(["a"], ["lite0"], [64], [2])] == [
        "a/lite0-64-convergence/bgad-seed2.json"
    ]
    assert Run("a", "lite0", 64, "7-epochs", "cfa", 1).title == "a: CFA (lite0, 64 px, 7 epochs), seed 1"


def test_names_of_features() -> None:
    assert features_named("lite2") == ("lite2", "lite2", "tf_efficientnet_lite2", "whiten", None)
    assert features_named("lite2-sharp") == ("lite2-sharp", "lite2", "tf_efficientnet_lite2", "whiten", 1)
    assert features_named("lite2-raw") == ("lite2-raw", "lite2", "tf_efficientnet_lite2", "none", None)
    assert features_named("lite2-channel") == ("lite2-channel", "lite2", "tf_efficientnet_lite2", "channel", None)
    assert features_named("gabor")[:3] == ("gabor", "gabor", "gabor")
    assert features_named("resnet18").backbone == "resnet18"


def test_backbones_are_built_as_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def noted(name: str, weights: str, standardize: str, neighborhood: int | None) -> None:
        asked.append((name, weights, standardize, neighborhood))

    monkeypatch.setattr("real_sets.backbones.create_backbone", noted)
    _, about = build(features_named("lite0"), "DIR/{features}.safetensors")
    _, raw = build(features_named("lite0-raw"), "random")
    name = "tf_efficientnet_lite0"
    assert asked == [(name, "DIR/lite0.safetensors", "whiten", None), (name, "random", "none", None)]
    assert (about["standardize"], about["weights"]) == ("whiten", "file")
    assert (raw["standardize"], raw["weights"]) == ("none", "random")
