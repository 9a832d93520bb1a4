"""Standardized features: their statistics against float64, what they travel with, and that other code gets them too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastbgad.backbones import create_backbone
from fastbgad.backbones.standardization import Standardization
from fastbgad.convert.model import from_model
from fastbgad.convert.standardizing_layers import standardizing_layers, with_standardizing_layers
from fastbgad.data import decoded as decoded_module
from fastbgad.errors import BackboneError, CheckpointError, FeatureError
from fastbgad.features import ImageFeatures, ImageReading, StoreOptions
from fastbgad.flow_spec import FlowSpec
from fastbgad.model import BGAD
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import PositionalRows
from fastbgad.reference import positional_encoding
from fastbgad.reference.standardization import FLOOR, RIDGE, channel_statistics, standardize, whitening_statistics
from fastbgad.train.fit import fit
from tests.flows import freia_flow
from tests.models import tiny_config, tiny_split

NET = "mobilenetv3_small_100"
SIZE = 64


def feature_maps(channels: int, sizes: list[tuple[int, int, int]], offset: float = 0.0) -> list[Tensor]:
    """Batches float64 [B, C, h, w] whose channels differ in mean and scale by orders of magnitude."""
    generator = torch.Generator().manual_seed(channels)
    return [
        offset
        + scales(channels) * (3 + torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64))
        for batch, height, width in sizes
    ]


def scales(channels: int) -> Tensor:
    return 10 ** torch.linspace(-1, 1.5, channels, dtype=torch.float64)[:, None, None]


def photographs(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [(1,), (3, 17), (40, 2, 113)])
def test_statistics_and_features_against_float64(channels: tuple[int, ...], dtype: torch.dtype) -> None:
    sizes = [(3, 5, 7), (1, 1, 1), (2, 8, 3)]
    levels = [[maps.to(dtype) for maps in feature_maps(count, sizes)] for count in channels]
    module = Standardization(channels)
    for level, count in enumerate(channels):  # nothing may be left of what was there before
        module.get_buffer(f"mean_{level}").fill_(torch.nan)
        module.get_buffer(f"scale_{level}").fill_(torch.nan)
        assert len(levels[level][0][0]) == count
    module.fit(zip(*levels, strict=True))
    got = module([maps[0] for maps in levels])
    for level, batches in enumerate(levels):
        mean, std = channel_statistics(batches)
        expected = standardize(batches[0], mean, std)
        # Statistics are kept in float32, and y = (x - mean) / std is rounded in each step and once more at the end.
        eps = torch.finfo(torch.float32).eps
        assert torch.allclose(module.get_buffer(f"mean_{level}").double(), mean, rtol=eps, atol=0)
        assert torch.allclose(module.get_buffer(f"scale_{level}").double(), std, rtol=eps, atol=0)
        budget = (
            4 * eps * (batches[0].double().abs() / std[:, None, None] + expected.abs() + mean.abs().max() / std.min())
        )
        budget += torch.finfo(dtype).eps * expected.abs()
        assert got[level].dtype == dtype
        assert bool(((got[level].double() - expected).abs() <= budget).all())


def test_a_large_mean_does_not_cancel() -> None:
    batches = feature_maps(5, [(4, 9, 9)] * 3, offset=1e4)
    module = Standardization((5,))
    module.fit([maps] for maps in batches)
    _, std = channel_statistics(batches)
    assert torch.allclose(module.get_buffer("scale_0").double(), std, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [(1,), (3, 17), (40, 2, 113)])
def test_whitening_against_float64(channels: tuple[int, ...], dtype: torch.dtype) -> None:
    sizes = [(3, 5, 7), (1, 1, 1), (2, 8, 3)]
    levels = [[mixed(maps).to(dtype) for maps in feature_maps(count, sizes)] for count in channels]
    module = Standardization(channels, "whiten")
    for level in range(len(channels)):
        for buffer in module.statistics(level):
            buffer.fill_(torch.nan)
    module.fit(zip(*levels, strict=True))
    got = module([maps[0] for maps in levels])
    for level, batches in enumerate(levels):
        mean, matrix = whitening_statistics(batches)
        expected = standardize(batches[0], mean, matrix)
        # Both factors of C products are rounded to float32, and so are their sums.
        eps = torch.finfo(torch.float32).eps
        size = batches[0].double().abs() + mean.abs()[:, None, None]
        budget = eps * (4 + len(mean)) * torch.einsum("dc,bchw->bdhw", matrix.abs(), size)
        budget += torch.finfo(dtype).eps * expected.abs()
        assert got[level].dtype == dtype
        assert bool(((got[level].double() - expected).abs() <= budget).all())


def mixed(maps: Tensor) -> Tensor:
    """Correlated channels of mean and scale 1, more or less."""
    count = maps.shape[1]
    matrix = torch.randn(count, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64) / count**0.5
    return 1 + torch.einsum("dc,bchw->bdhw", matrix, maps / scales(count))


def test_whitened_features_are_uncorrelated() -> None:
    (maps,) = (mixed(maps).float() for maps in feature_maps(5, [(6, 16, 16)]))
    module = Standardization((5,), "whiten")
    module.fit([[maps]])
    rows = module([maps])[0].double().movedim(1, 0).flatten(1)
    covariance = torch.cov(rows, correction=0)
    # What the ridge takes away: a direction of variance v ends with v / (v + ridge).
    variances = torch.linalg.eigvalsh(torch.cov(maps.double().movedim(1, 0).flatten(1), correction=0))
    ridge = RIDGE * variances.mean()
    assert torch.allclose(torch.linalg.eigvalsh(covariance), variances / (variances + ridge), atol=1e-4)
    assert rows.mean(1).abs().max() < 1e-4


def test_whitening_survives_directions_without_variance() -> None:
    (maps,) = (maps.float() for maps in feature_maps(3, [(4, 6, 6)]))
    twice = torch.cat([maps, maps[:, :1], torch.full_like(maps[:, :1], 7.0)], 1)
    module = Standardization((5,), "whiten")
    module.fit([[twice]])
    whitened = module([twice])[0]
    assert bool(torch.isfinite(whitened).all())
    assert float(whitened.abs().max()) < 20


def test_a_channel_that_hardly_varies_gets_a_floor() -> None:
    maps = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    maps[:, 1] = 5.0
    module = Standardization((3,))
    module.fit([[maps]])
    std = module.get_buffer("scale_0")
    spread = ((maps[:, 0].var(correction=0) + maps[:, 2].var(correction=0)) / 3).sqrt()
    assert float(std[1]) == pytest.approx(FLOOR * float(spread), rel=1e-5)
    assert bool((module([maps])[0][:, 1] == 0).all())
    mean, expected = channel_statistics([maps])
    assert torch.allclose(std.double(), expected, rtol=1e-6)
    assert float(mean[1]) == 5.0


def test_features_that_cannot_be_standardized() -> None:
    module = Standardization((2,))
    with pytest.raises(FeatureError, match="no feature statistics yet"):
        module([torch.zeros(1, 2, 3, 3)])
    with pytest.raises(FeatureError, match="no images to learn"):
        module.fit([])
    constant = torch.full((2, 2, 4, 4), 0.1)
    with pytest.raises(FeatureError, match=r"level 0 do not vary.*--standardize none"):
        module.fit([[constant]])
    broken = torch.zeros(1, 2, 4, 4)
    broken[0, 1, 2, 2] = torch.nan
    with pytest.raises(FeatureError, match="level 0 contain NaN or Inf"):
        module.fit([[broken]])
    assert not module.fitted


def test_a_backbone_standardizes_its_training_images() -> None:
    backbone = create_backbone(NET, (0, 2), "random", standardize="channel")
    assert backbone.needs_fit
    with pytest.raises(FeatureError, match=r"call fit\(\)"):
        backbone(photographs())
    backbone.fit(photographs(5).split(2))
    assert not backbone.needs_fit
    raw = backbone.extract(photographs(5))
    for level, maps in enumerate(backbone(photographs(5))):
        rows = maps.double().movedim(1, 0).flatten(1)
        _, std = channel_statistics([raw[level]])
        floored = std * 0.999 > raw[level].double().movedim(1, 0).flatten(1).std(1, correction=0)
        assert rows.mean(1).abs().max() < 1e-3
        assert torch.allclose(rows.std(1, correction=0)[~floored], torch.ones(()).double(), rtol=1e-4)
        assert torch.equal(maps, backbone.standardize_level(level, raw[level]))


def test_statistics_travel_with_the_backbone() -> None:
    backbone = create_backbone(NET, (1, 2), "random", seed=3)
    before = backbone.fingerprint()
    backbone.fit([photographs()])
    assert backbone.fingerprint() != before
    again = create_backbone(**json.loads(json.dumps(backbone.config())), weights="random")
    assert again.needs_fit
    again.load_state_dict(backbone.state_dict())
    assert not again.needs_fit
    assert all(torch.equal(a, b) for a, b in zip(again(photographs()), backbone(photographs()), strict=True))
    # The same network for other images: its statistics are its own.
    other = backbone.without_statistics()
    assert other.needs_fit
    assert other.net is backbone.net  # type: ignore[attr-defined]
    other.fit([255 - photographs()])
    kept = again.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in backbone.state_dict().items())


def test_a_filter_bank_without_statistics_keeps_the_other_as_it_is() -> None:
    fitted = create_backbone("gabor")
    fitted.fit([photographs()])
    before = {name: tensor.clone() for name, tensor in fitted.state_dict().items()}
    other = fitted.without_statistics()
    assert other.needs_fit
    other.fit([255 - photographs()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in fitted.state_dict().items())


def test_choices() -> None:
    plain = create_backbone(NET, (1,), "random", standardize="none")
    assert not plain.needs_fit
    assert torch.equal(plain(photographs())[0], plain.extract(photographs())[0])
    plain.fit([photographs()])
    assert plain.config()["standardize"] == "none"
    with pytest.raises(BackboneError, match="choose one of whiten, channel, none"):
        create_backbone(NET, (1,), "random", standardize="robust")  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match="gabor backbone has a standardization of its own"):
        create_backbone("gabor", standardize="none")


@pytest.mark.parametrize("name", ["gabor", NET])
def test_each_image_goes_through_the_network_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and features come from one pass, and are those of a pass each."""
    split = tiny_split(tmp_path / "data")
    images = [*split.normals, *split.test]
    options = {} if name == "gabor" else {"weights": "random"}
    backbone, seen = create_backbone(name, (1, 2), **options), []  # type: ignore[arg-type]
    load = decoded_module.load_sample
    monkeypatch.setattr(decoded_module, "load_sample", lambda s, size: seen.append(s) or load(s, size))
    encoded = []
    extract = type(backbone).extract
    monkeypatch.setattr(type(backbone), "extract", lambda self, batch: encoded.extend(batch) or extract(self, batch))
    features = ImageFeatures(backbone, (SIZE, SIZE), images, split.normals, reading=ImageReading(batch_size=2))
    features.extract(images)
    assert len(seen) == len(set(seen)) == len(images)
    assert len(encoded) == len(images) + 1  # and a gray one, which tells the sizes of the levels
    monkeypatch.undo()
    for sample in (split.normals[0], split.normals[-1], split.test[0]):
        expected = backbone(load(sample, (SIZE, SIZE)).image[None])
        for level, maps in enumerate(expected):
            found = features.store.maps(level, features.slots([sample]))
            assert torch.allclose(found, maps, rtol=1e-4, atol=1e-4), (sample, level)


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    """Features are standardized in float32 and then stored in float16, not the other way round."""
    split = tiny_split(tmp_path / "data")
    backbone = create_backbone(NET, (1,), "random")
    store, reading = StoreOptions(dtype=torch.float16), ImageReading(batch_size=5)
    features = ImageFeatures(backbone, (SIZE, SIZE), split.normals, split.normals, store=store, reading=reading)
    features.extract(split.normals)
    images = torch.stack([features.decoded(sample).image for sample in split.normals])
    expected = backbone(images)[0].half()
    assert torch.equal(features.store.maps(0, features.slots(split.normals)), expected)


def test_a_trained_model_keeps_its_statistics(tmp_path: Path) -> None:
    split, config = tiny_split(tmp_path / "data"), tiny_config("nfad")
    model = BGAD(create_backbone(NET, (1, 2), "random"), (SIZE, SIZE), flow=config.flow)
    fit(model, split, config)
    model.save(tmp_path / "model.safetensors")
    loaded = BGAD.load(tmp_path / "model.safetensors")
    assert loaded.architecture()["backbone"]["standardize"] == "whiten"
    found, expected = loaded.predict(photographs()), model.eval().predict(photographs())
    assert torch.allclose(found.anomaly_map, expected.anomaly_map, atol=1e-5)


def test_models_of_before_there_was_a_choice_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, config = tiny_split(tmp_path / "data"), tiny_config("nfad")
    model = BGAD(create_backbone(NET, (1, 2), "random", standardize="none"), (SIZE, SIZE), flow=config.flow)
    fit(model, split, config)
    described = model.architecture()
    del described["backbone"]["standardize"]
    monkeypatch.setattr(model, "architecture", lambda: described)
    model.save(tmp_path / "old.safetensors")
    loaded = BGAD.load(tmp_path / "old.safetensors")
    assert loaded.backbone.standardization is None
    assert torch.allclose(
        loaded.predict(photographs()).anomaly_map, model.predict(photographs()).anomaly_map, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["channel", "channel, hard", "whiten"])
@pytest.mark.parametrize("channels", [2, 7, 24])
def test_the_standardizing_layers_of_other_code(channels: int, kind: str) -> None:
    """FrEIA with more layers computes from raw features what we do from standardized ones, but for a constant."""
    hard = kind.endswith("hard")
    spec = FlowSpec(channels, 8, 2, hard_permutation=hard)
    flow = ConditionalFlow(spec, seed=1).double().requires_grad_(False)
    (maps,) = feature_maps(channels, [(2, 3, 4)])
    if kind == "whiten":
        mean, scale = (statistic.float() for statistic in whitening_statistics([mixed(maps)]))
        log_g = torch.linalg.slogdet(scale.double()).logabsdet
    else:
        mean, scale = (statistic.float() for statistic in channel_statistics([maps]))
        scale[0] = 0.003  # its inverse, 333, would overflow exp(5 / std)
        log_g = -scale.double().log().sum()
    state = with_standardizing_layers(flow.state_dict(), spec, mean, scale)
    layers = 2 + standardizing_layers(kind.partition(",")[0])
    theirs = freia_flow(FlowSpec(channels, 8, layers, hard_permutation=hard)).double()
    theirs.load_state_dict(state)
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    positions = positional_encoding(8, 3, 4, torch.float64).repeat(2, 1, 1, 1).permute(0, 2, 3, 1).reshape(-1, 8)
    standardized = standardize(maps, mean, scale).permute(0, 2, 3, 1).flatten(0, 2)
    expected = flow(standardized, PositionalRows(3, 4, channels=8), return_z=True, impl="reference")
    with torch.no_grad():
        z, log_det = theirs(rows, [positions])
    tolerance = 1e-5 * float(expected.z.abs().max())  # the layers' constants are float32
    assert torch.allclose(z, expected.z, atol=tolerance)
    assert torch.allclose(log_det - expected.log_det, log_g.expand(len(rows)), rtol=1e-5, atol=1e-5)


def test_flows_that_cannot_express_it() -> None:
    for spec, scale in ((FlowSpec(4, 8, 1, global_affine="SIGMOID"), torch.ones(4)),
                        (FlowSpec(4, 8, 1, hard_permutation=True), torch.eye(4))):  # fmt: skip
        with pytest.raises(ValueError, match="cannot express"):
            with_standardizing_layers({}, spec, torch.zeros(4), scale)


@pytest.mark.parametrize("size", [3, 5])
def test_coarse_levels_are_averaged_over_neighbors(size: int) -> None:
    """By a loop over patches: the mean of those neighbors that there are; levels of stride 4 and less stay sharp."""
    plain = create_backbone(NET, (0, 1, 2, 3), "random", standardize="none")
    pooled = create_backbone(NET, (0, 1, 2, 3), "random", standardize="none", neighborhood=size)
    assert plain.strides == (2, 4, 8, 16)
    before, after = plain.extract(photographs()), pooled.extract(photographs())
    for level in (0, 1):
        assert torch.equal(before[level], after[level])
    for level in (2, 3):
        maps, expected = before[level].double(), torch.empty_like(before[level], dtype=torch.float64).fill_(torch.nan)
        height, width = maps.shape[2:]
        for y in range(height):
            for x in range(width):
                rows = slice(max(0, y - size // 2), y + size // 2 + 1)
                columns = slice(max(0, x - size // 2), x + size // 2 + 1)
                expected[:, :, y, x] = maps[:, :, rows, columns].mean((2, 3))
        assert torch.allclose(after[level].double(), expected, rtol=1e-5, atol=1e-6 * float(maps.abs().max()))


def test_neighborhoods() -> None:
    assert create_backbone(NET, (2,), "random").config()["neighborhood"] == 3
    assert create_backbone(NET, (2,), "random", standardize="none").config()["neighborhood"] == 1
    for size in (0, 2, -3):
        with pytest.raises(BackboneError, match="odd number"):
            create_backbone(NET, (2,), "random", neighborhood=size)
    with pytest.raises(BackboneError, match="leave standardize and neighborhood out"):
        create_backbone("gabor", neighborhood=3)
    model = BGAD(create_backbone("resnet18", (1, 2), "random"), (SIZE, SIZE))
    with pytest.raises(CheckpointError, match="averaged over neighbors"):
        from_model(model, "bgad")
