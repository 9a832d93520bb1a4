"""Cells that are run: what they are measured on, what they share, what is kept, and that they are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbgad.backbones import Backbone, create_backbone
from fastbgad.data import Category, DecodedImages, Split, open_category, split_known_anomalies
from fastbgad.errors import ConfigError, DataError, MetricError
from fastbgad.evaluate.evaluation import evaluate_model
from fastbgad.experiments.peers.peers import PeerScores
from fastbgad.experiments.plan.cells import METRICS, Cell
from fastbgad.experiments.plan.setup import Setup
from fastbgad.experiments.running import cell_runner as run_module
from fastbgad.experiments.running.cell_runner import CellRunner
from fastbgad.features import FeatureStore
from fastbgad.features.image_features import ImageFeatures
from fastbgad.model import BGAD
from fastbgad.train.fit import fit
from tests.make_data import make_mvtec
from tests.models import SIZE, tiny_config

CPU = torch.device("cpu")
SETUP = Setup(backbone="gabor", image_size=(SIZE, SIZE), training=tiny_config(meta_epochs=3, chunk_rows=1000))


@pytest.fixture
def category(tmp_path: Path) -> Category:
    make_mvtec(tmp_path, "tile", normals=5, per_type=3, size=SIZE, types=("crack", "dent", "rough"), test_normals=3)
    return open_category(tmp_path, "tile")


@pytest.fixture
def runner(category: Category, tmp_path: Path) -> Iterator[CellRunner]:
    made = CellRunner(SETUP, category, "mvtec", device=CPU, pictures=tmp_path / "pictures")
    yield made
    made.close()


def cell(method: str = "bgad", **options: Any) -> Cell:
    return Cell("mvtec", "tile", method, **{"num_anomalies": 2, **options})


def test_the_last_epoch_is_what_training_and_evaluation_alone_give(runner: CellRunner, category: Category) -> None:
    (result,) = runner.run([cell(seed=1)])
    split = split_known_anomalies(category, 2, seed=1)
    config = SETUP.training_of(cell(seed=1))
    model = BGAD(create_backbone("gabor"), (SIZE, SIZE), flow=config.flow, seed=1)
    # statistics of all training normals, as the runner's
    fit(model, split, config)
    metrics = evaluate_model(model, split.test, calibration="official").metrics
    for name in METRICS:
        assert result.last[name] == pytest.approx(float(getattr(metrics, name)), abs=2e-3)
    assert result.known_anomalies == [sample.name for sample in split.known_anomalies]
    assert (result.n_test, result.n_anomalous) == (10, 7)
    assert len(result.epochs) == 3
    assert result.epochs[-1] == result.last
    assert result.best == {name: max(epoch[name] for epoch in result.epochs) for name in METRICS}
    assert result.facts["training_images"] == 5


def test_one_training_serves_all_cells_that_share_it(
    runner: CellRunner, category: Category, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFAD learns from no anomaly: measured on four test sets, trained once; each as if it were run alone."""
    cells = [
        cell("nfad"),
        cell("nfad", known_types=("crack",), test_types=("dent", "rough")),
        cell("nfad", num_anomalies=1, test_types=("dent",)),
        cell("nfad", num_anomalies=0),
    ]
    trainings = []
    monkeypatch.setattr(run_module, "fit", lambda *args, **options: trainings.append(args) or fit(*args, **options))
    together = runner.run(cells)
    assert len(trainings) == 1
    drawn = split_known_anomalies(category, 1).known_anomalies[0].defect
    dents = 3 - (drawn == "dent")
    assert [(r.n_test, r.n_anomalous) for r in together] == [(10, 7), (9, 6), (3 + dents, dents), (12, 9)]
    for one, result in zip(cells, together, strict=True):
        (alone,) = runner.run([one])
        assert alone.last == pytest.approx(result.last)
        assert alone.best == pytest.approx(result.best)
    # a split of one type leaves that type's images out of the test altogether
    names = {name.split("/")[0] for name in together[1].known_anomalies}
    assert names == {"crack"}


def test_features_are_extracted_once_for_all_trainings(runner: CellRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    extract = ImageFeatures.extract

    def noted(self: ImageFeatures, samples: Sequence[Any]) -> None:
        files.extend(s for s in dict.fromkeys(samples) if s not in self._stored)
        extract(self, samples)

    monkeypatch.setattr(ImageFeatures, "extract", noted)
    encoded = []
    put = FeatureStore.put
    monkeypatch.setattr(
        FeatureStore, "put", lambda self, slots, *rest: encoded.extend(slots) or put(self, slots, *rest)
    )
    for one in (cell("nfad"), cell("bgad"), cell("bgad", seed=1), cell("bgad", num_anomalies=4), cell("bgad_dagger")):
        runner.run([one])
    assert len(files) == len(set(files)) == 12  # those of the 5 normal images came with the statistics
    assert sorted(slot for slot in encoded if slot < 17) == list(range(17))


def test_overrides_and_calibration_reach_the_training(category: Category) -> None:
    results = {}
    for name, setup, overrides in (
        ("usual", SETUP, ()),
        ("deeper", SETUP, (("flow.coupling_layers", 3),)),
        ("training", replace(SETUP, calibration="training"), ()),
        ("bfloat16", replace(SETUP, matmul_precision="bfloat16"), ()),
    ):
        made = CellRunner(setup, category, "mvtec", device=CPU)
        (results[name],) = made.run([cell(overrides=overrides)])
        made.close()
    usual = results.pop("usual")
    assert results["deeper"].facts["parameters"] == pytest.approx(1.5 * usual.facts["parameters"], rel=0.01)
    for result in results.values():
        assert result.last != usual.last
        assert result.last["pixel_auroc"] > 0.5
    assert results["bfloat16"].last == pytest.approx(usual.last, abs=0.03)


def test_pictures_of_defect_types(runner: CellRunner, category: Category, tmp_path: Path) -> None:
    runner.run([cell("nfad"), cell("nfad", known_types=("crack",), test_types=("dent", "rough"))])
    (file,) = (tmp_path / "pictures").iterdir()
    assert file.name == f"{cell('nfad').key}.npz"
    arrays = np.load(file)
    assert len({name.split("/")[0] for name in arrays["names"]}) == len(arrays["names"]) == 3
    assert arrays["images"].shape == (3, SIZE, SIZE, 3)
    assert arrays["masks"].any(axis=(1, 2)).all()
    inside = [arrays["maps"][i][arrays["masks"][i]].mean() for i in range(3)]
    outside = [arrays["maps"][i][~arrays["masks"][i]].mean() for i in range(3)]
    assert all(a > b for a, b in zip(inside, outside, strict=True))
    assert arrays["range"][0] < arrays["range"][1]


def test_a_peer_is_trained_once_and_measured_on_each_cells_images(
    runner: CellRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer whose maps are the masks themselves scores 1 everywhere, if masks and maps belong to the same images."""
    calls: list[Split] = []
    decoded = DecodedImages((SIZE, SIZE))

    def perfect(one: Cell, category: Category, split: Split, setup: Setup, device: Any, workers: int) -> PeerScores:
        calls.append(split)
        masks = torch.stack([decoded(s).mask for s in split.test]).float()
        return PeerScores(masks, masks.amax(dim=(1, 2)), {"recipe": "none"})

    monkeypatch.setattr(run_module, "run_peer", perfect)
    cells = [cell("padim"), cell("padim", known_types=("crack",), test_types=("dent", "rough"))]
    results = runner.run(cells)
    assert len(calls) == 1
    assert calls[0].known_anomalies == ()
    for result in results:
        assert result.last == {"image_auroc": 1.0, "pixel_auroc": 1.0, "aupro": 1.0}
        assert result.best is None
        assert result.epochs == []
        assert result.facts["recipe"] == "none"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (cell(num_anomalies=10), "num_anomalies is 10 in total but .* has 9 anomalous images"),
        (cell(known_types=("crak",)), "did you mean crack"),
        (cell(test_types=("scratch",)), "no anomaly type scratch; it holds crack, dent, rough"),
        (cell(num_anomalies=3, known_types=("crack",), test_types=("crack",)), "no anomalous image of crack is left"),
    ],
)
def test_what_a_category_cannot_give(runner: CellRunner, bad: Cell, message: str) -> None:
    with pytest.raises(DataError, match=message):
        runner.run([bad])


def test_cells_need_all_metrics(runner: CellRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runner.category
    for test, message in (
        (tuple(s._replace(mask=None) for s in whole.test), "has anomalous images without a mask"),
        (tuple(s for s in whole.test if not s.label), "has no anomalous test images"),
        (tuple(s for s in whole.test if s.label), "has no normal test images"),
    ):
        monkeypatch.setattr(runner, "category", replace(whole, test=test))
        with pytest.raises(MetricError, match=f"{message}.*category {whole.name}"):
            runner.run([cell("nfad", num_anomalies=0)])


def test_anomalies_set_aside_for_training_spare_the_test(category: Category) -> None:
    aside = tuple(s for s in category.test if s.label)[::2]
    split = replace(category, test=tuple(s for s in category.test if s not in aside), known=aside)
    runner = CellRunner(SETUP, split, "mvtec", device=CPU)
    (result,) = runner.run([cell("bgad")])
    runner.close()
    assert set(result.known_anomalies) < {sample.name for sample in aside}
    assert result.n_test == len(split.test)


def test_an_unknown_override(runner: CellRunner) -> None:
    with pytest.raises(ConfigError, match=r"no option 'loss\.gamma'"):
        runner.run([cell(overrides=(("loss.gamma", 1.0),))])


def test_timm_networks_are_loaded_once(category: Category, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def create(name: str, *args: Any, **options: Any) -> Backbone:
        made.append(name)
        return create_backbone(name, *args, **options)

    monkeypatch.setattr(run_module, "create_backbone", create)
    run_module._timm_backbone.cache_clear()
    setup = replace(SETUP, backbone="resnet18", weights="random", levels=(2, 3))
    for _ in range(2):
        made_runner = CellRunner(setup, category, "mvtec", device=CPU)
        (result,) = made_runner.run([cell("nfad")])
        assert 0 <= result.last["aupro"] <= 1
        made_runner.close()
    assert made == ["resnet18"]
    run_module._timm_backbone.cache_clear()
