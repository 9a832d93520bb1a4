"""Features shared by runs: each image is read and encoded once, and runs come out as with features of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastbgad.backbones import create_backbone
from fastbgad.data import AnomalySynthesis, AugmentedAnomalies, Split
from fastbgad.data import decoded as decoded_module
from fastbgad.errors import ConfigError, DataError
from fastbgad.features import FeatureStore, ImageFeatures, ImageReading
from fastbgad.model import BGAD
from fastbgad.train.fit import fit, spare_slots
from fastbgad.train.synthesis_ahead import SynthesisAhead
from tests.fake_cuda import GPU, FakeCuda, fake_cuda
from tests.models import SIZE, tiny_config, tiny_model, tiny_split

__all__ = ["fake_cuda"]


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return tiny_split(tmp_path / "data")


def features_of(split: Split, spare: int = 0) -> ImageFeatures:
    samples = [*split.normals, *split.known_anomalies, *split.test]
    reading = ImageReading(batch_size=3)
    return ImageFeatures(create_backbone("gabor"), (SIZE, SIZE), samples, split.normals, spare, reading=reading)


def test_every_image_is_read_and_encoded_once(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    read, encoded = [], []
    load, put = decoded_module.load_sample, FeatureStore.put
    monkeypatch.setattr(decoded_module, "load_sample", lambda s, size: read.append(s) or load(s, size))
    monkeypatch.setattr(
        FeatureStore, "put", lambda self, slots, *rest: encoded.extend(slots) or put(self, slots, *rest)
    )
    features = features_of(split)
    features.extract(split.normals)
    features.extract([*split.test, *split.normals])
    features.extract(split.known_anomalies)
    assert len(read) == len(set(read)) == len(split.normals) + len(split.test) + len(split.known_anomalies)
    assert sorted(encoded) == list(range(len(read)))


def test_runs_that_share_features_come_out_the_same(split: Split) -> None:
    """Two methods and two seeds one after the other on one set of features, each as if it were alone."""
    shared = features_of(split)
    for method, seed in (("bgad", 0), ("nfad", 0), ("bgad", 1)):
        config = replace(tiny_config(method), seed=seed)
        alone = tiny_model(config)
        fit(alone, split, config)
        shared.reserve(spare_slots(config, len(split.known_anomalies)))
        model = BGAD(shared.backbone, (SIZE, SIZE), flow=config.flow, seed=seed)
        fit(model, split, config, features=shared)
        theirs = alone.state_dict()
        for name, tensor in model.state_dict().items():
            # batches of another composition may round differently by an ulp
            assert torch.allclose(tensor, theirs[name], rtol=2e-4, atol=2e-5), (method, seed, name)


def test_reserving_keeps_what_is_there(split: Split) -> None:
    features = features_of(split)
    features.extract(split.test)
    slots = features.slots(split.test)
    before = [features.store.maps(level, slots) for level in range(3)]
    features.reserve(5)
    features.reserve(3)
    assert len(features.spare) == 5
    assert features.spare.start == max(features.slots([*split.normals, *split.known_anomalies, *split.test])) + 1
    assert all(torch.equal(features.store.maps(level, slots), maps) for level, maps in enumerate(before))


def test_features_of_another_run_are_refused(split: Split) -> None:
    features, config = features_of(split), tiny_config()
    with pytest.raises(ConfigError, match="another backbone"):
        fit(tiny_model(config), split, config, features=features)
    model = BGAD(features.backbone, (SIZE, SIZE), flow=config.flow)
    with pytest.raises(ConfigError, match="0 spare slots but the run synthesizes 8"):
        fit(model, split, config, features=features)


def test_synthesis_is_made_ahead_in_turns(split: Split) -> None:
    """Every generation is what the plan says, in the bank that the one before it does not use."""
    plan = AugmentedAnomalies(
        split.known_anomalies, split.normals, AnomalySynthesis(repeat=1, cut_paste=2), SIZE, seed=3
    )
    indices = [i for i in range(len(plan)) if plan.is_synthetic(i)]
    features = features_of(split, spare=2 * len(indices))
    ahead = SynthesisAhead(plan, indices, features, generations=3, workers=2)
    banks = []
    for generation in range(3):
        slots = ahead.take(generation)
        assert ahead.take(generation) == slots  # asked again within a generation
        banks.append(set(slots))
        made = [plan.get(generation, i) for i in indices]
        with torch.inference_mode():
            expected = features.backbone(torch.stack([sample.image for sample in made]))
        for level, maps in enumerate(expected):
            assert torch.allclose(features.store.maps(level, slots), maps, atol=1e-4)
    ahead.close()
    assert banks[0] == banks[2]
    assert not banks[0] & banks[1]


def test_synthesis_in_the_background_has_one_stream(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts after all work asked for so far, and its features are there when its thread is done."""
    features: Any = SimpleNamespace(device=GPU, spare=range(2))
    anomalies: Any = SimpleNamespace(get=lambda generation, index: None)
    ahead = SynthesisAhead(anomalies, [0], features, generations=2, workers=1)
    monkeypatch.setattr(
        ahead, "_extract", lambda generation: fake_cuda.log.append((generation, fake_cuda.current.name))
    )
    assert [ahead.take(generation) for generation in range(2)] == [[0], [1]]
    ahead.close()
    aside = "stream 1"
    assert len(fake_cuda.streams) == 2
    for generation in range(2):
        assert fake_cuda.log[4 * generation : 4 * generation + 4] == [
            ("event", "default"), ("wait", aside, "event on default"), (generation, aside), ("synchronize", aside)
        ]  # fmt: skip


def test_an_anomaly_that_cannot_be_pasted_ends_training_with_its_name(split: Split) -> None:
    vanished = split.known_anomalies[0]._replace(mask=split.normals[0].image)  # no mask at all, but a gray photograph
    broken = replace(split, known_anomalies=(vanished,))
    config = tiny_config()
    with pytest.raises(DataError, match=str(vanished.mask)):
        fit(tiny_model(config), broken, config)
