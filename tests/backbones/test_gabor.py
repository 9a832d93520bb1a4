"""The Gabor backbone: its filters, its statistics, and whether its features tell defects from texture."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from fastbgad.backbones import GaborBackbone, create_backbone
from fastbgad.backbones.gabor import contour_bank, gabor_bank, line_bank
from fastbgad.errors import BackboneError, FeatureError


def texture(batch: int, size: tuple[int, int] = (96, 96), seed: int = 0) -> Tensor:
    """Smoothed noise in three slightly different colors, uint8."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 1, *size, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    tint = torch.tensor([1.0, 0.9, 0.8]).view(1, 3, 1, 1)
    grain = torch.randn(batch, 3, *size, generator=generator)
    return ((110 + 60 * smooth) * tint + 2 * grain).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def fitted() -> GaborBackbone:
    backbone = GaborBackbone()
    backbone.fit(texture(12).split(4))
    return backbone


def test_gabor_filters_are_quadrature_pairs_tuned_to_their_wavelength_and_orientation() -> None:
    orientations, wavelength = 6, 6.0
    bank = gabor_bank(orientations, wavelength, sigma=3, aspect=0.8, size=21).double()
    assert bank.shape == (12, 1, 21, 21)
    torch.testing.assert_close(bank.sum((1, 2, 3)), torch.zeros(12, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(bank.square().sum((1, 2, 3)), torch.ones(12, dtype=torch.float64))
    even, odd = bank[:6], bank[6:]
    torch.testing.assert_close(even.flip(2, 3), even)
    torch.testing.assert_close(odd.flip(2, 3), -odd)
    axis = torch.arange(21, dtype=torch.float64) - 10
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for index in range(orientations):
        angle = math.pi * index / orientations
        amplitudes = []
        for phase in (0.0, 0.7, 2.0):
            wave = torch.cos(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / wavelength + phase)
            energy = (even * wave).sum((1, 2, 3)).square() + (odd * wave).sum((1, 2, 3)).square()
            assert energy.argmax() == index
            amplitudes.append(energy[index].sqrt())
        # A quadrature pair does not care where in the wave it stands.
        assert max(amplitudes) < 1.01 * min(amplitudes)


def test_line_filters_answer_lines_and_neither_brightness_nor_edges() -> None:
    bank = line_bank(16, wavelength=5, sigma=1.2, length=6, size=21)[:, 0]
    line = torch.zeros(21, 21)
    line[:, 10] = 1
    response = (bank * line).sum((1, 2))
    assert response.argmax() == 0
    assert response[0] > 3 * response[4:13].abs().max()
    assert (bank * -line).sum((1, 2))[0] == -response[0]
    assert bank.sum((1, 2)).abs().max() < 1e-6
    edge = torch.zeros(21, 21)
    edge[:, 11:] = 1
    edge[:, 10] = 0.5
    assert (bank[0] * edge).sum().abs() < 1e-6


def test_contour_filters_average_along_the_line_that_the_line_filter_answers() -> None:
    bank = contour_bank(16, sigma=0.6, length=4, size=15)[:, 0]
    torch.testing.assert_close(bank.sum((1, 2)), torch.ones(16))
    vertical, diagonal = torch.zeros(15, 15), torch.eye(15)
    vertical[:, 7] = 1
    for line in (vertical, diagonal):
        answer = (line_bank(16, wavelength=5, sigma=1.2, length=6, size=15)[:, 0] * line).sum((1, 2))
        assert (bank * line).sum((1, 2)).argmax() == answer.argmax()


def test_training_cells_are_standardised(fitted: GaborBackbone) -> None:
    features = fitted(texture(12))
    assert [feature.shape for feature in features] == [(12, 32, 24, 24), (12, 32, 12, 12), (12, 32, 6, 6)]
    assert fitted.channels == (32, 32, 32)
    assert fitted.strides == (4, 8, 16)
    for feature, mean, std in zip(features, fitted.mean, fitted.std, strict=True):
        z = 4 * torch.sinh(feature.double() / 4)  # undoes the compression
        torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(32, dtype=torch.float64), atol=1e-3, rtol=0)
        varies = std > 1e-3
        assert varies.sum() >= 28
        torch.testing.assert_close(z.std((0, 2, 3))[varies], torch.ones(int(varies.sum())).double(), atol=1e-2, rtol=0)
        assert torch.isfinite(mean).all()


def test_statistics_do_not_depend_on_how_the_images_are_batched(fitted: GaborBackbone) -> None:
    other = GaborBackbone()
    other.fit(iter(texture(12).split([1, 7, 4])))
    torch.testing.assert_close(other.mean, fitted.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.std, fitted.std, rtol=1e-5, atol=1e-6)
    assert other.cells_seen.tolist() == [12 * 24 * 24, 12 * 12 * 12, 12 * 6 * 6]


def test_fitting_again_forgets_the_first_images(fitted: GaborBackbone) -> None:
    other = GaborBackbone()
    other.fit([255 - texture(3, seed=5)])
    other.fit(texture(12).split(4))
    assert other.fingerprint() == fitted.fingerprint()


def test_before_fit_it_says_what_to_do() -> None:
    backbone = GaborBackbone()
    assert backbone.needs_fit
    with pytest.raises(FeatureError, match=r"call fit\(\) with batches of normal training images"):
        backbone(texture(1))
    backbone.fit([texture(2)])
    assert not backbone.needs_fit


def test_no_images_or_images_without_texture_are_refused() -> None:
    backbone = GaborBackbone()
    with pytest.raises(FeatureError, match="no batch of normal images"):
        backbone.fit([])
    with pytest.raises(FeatureError, match="all of one color"):
        backbone.fit([torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)])
    assert backbone.needs_fit
    with pytest.raises(FeatureError, match="span nan"):
        backbone.fit([torch.full((1, 3, 64, 64), float("nan"))])


def test_grey_normals_make_colour_an_anomaly_and_stay_finite() -> None:
    gray = texture(6)[:, :1].expand(-1, 3, -1, -1)
    backbone = GaborBackbone()
    backbone.fit([gray])
    stained = gray[:1].clone()
    stained[:, 2, 40:56, 40:56] //= 2
    clean, dirty = backbone(gray[:1])[0][0], backbone(stained)[0][0]
    assert torch.isfinite(dirty).all()
    assert dirty[:, 11:13, 11:13].abs().max() > 2 * clean.abs().max()
    assert dirty.abs().max() < 60


def test_the_state_dict_carries_the_statistics(fitted: GaborBackbone) -> None:
    other = create_backbone(**json.loads(json.dumps(fitted.config())))
    assert other.needs_fit
    assert other.fingerprint() != fitted.fingerprint()
    other.load_state_dict(fitted.state_dict())
    assert not other.needs_fit
    assert other.fingerprint() == fitted.fingerprint()
    for loaded, original in zip(other(texture(2, seed=9)), fitted(texture(2, seed=9)), strict=True):
        assert torch.equal(loaded, original)
    other.load_state_dict(GaborBackbone().state_dict())
    assert other.needs_fit


def test_it_is_deterministic_and_works_in_inference_mode(fitted: GaborBackbone) -> None:
    images = texture(2, seed=3)
    with torch.inference_mode():
        first = fitted(images)
    for once, again, from_floats in zip(first, fitted(images), fitted(images.double() / 255), strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(from_floats, once, rtol=1e-4, atol=1e-4)
    assert not list(fitted.parameters())
    assert not fitted.train().training


def test_an_image_alone_or_in_a_batch_gives_the_same_features(fitted: GaborBackbone) -> None:
    images = texture(5, (80, 112), seed=4)
    together = fitted(images)
    for index in range(5):
        for alone, batched in zip(fitted(images[index : index + 1]), together, strict=True):
            torch.testing.assert_close(alone[0], batched[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (71, 64), (100, 130)])
def test_any_size_works_and_the_last_cell_may_be_incomplete(size: tuple[int, int], fitted: GaborBackbone) -> None:
    for feature, stride in zip(fitted(texture(1, size)), fitted.strides, strict=True):
        assert feature.shape[2:] == tuple(math.ceil(side / stride) for side in size)
        assert torch.isfinite(feature).all()


def test_a_choice_of_levels_gives_the_same_features_as_all(fitted: GaborBackbone) -> None:
    some = create_backbone("gabor", (1, 3))
    some.fit(texture(12).split(4))
    everything = fitted(texture(1, seed=2))
    assert some.strides == (4, 16)
    for feature, expected in zip(some(texture(1, seed=2)), [everything[0], everything[2]], strict=True):
        torch.testing.assert_close(feature, expected)


def test_features_tell_defects_from_texture(fitted: GaborBackbone) -> None:
    """Each defect must stand out of unseen normal texture under a Gaussian model of the training cells."""
    train, normal = fitted(texture(12)), texture(4, seed=20)
    defects = {name: normal.clone() for name in ("scratch", "hole", "stain", "streaks")}
    defects["scratch"][:, :, 20:76, 47:49] = 215
    defects["hole"][:, :, 40:52, 40:52] = 15
    defects["stain"][:, :, 36:60, 36:60] = (
        defects["stain"][:, :, 36:60, 36:60].float() * torch.tensor([0.9, 0.75, 0.5]).view(1, 3, 1, 1)
    ).to(torch.uint8)
    defects["streaks"][:, :, 24:72, 24:72] = normal[:, :, 24:25, 24:72]
    for level, cells in enumerate(train):
        rows = cells.movedim(1, 0).flatten(1).double()
        mean, precision = rows.mean(1), torch.linalg.inv(torch.cov(rows) + 1e-3 * torch.eye(32))

        def worst(images: Tensor, level: int = level, mean: Tensor = mean, precision: Tensor = precision) -> Tensor:
            centred = fitted(images)[level].double() - mean[:, None, None]
            return torch.einsum("bchw,cd,bdhw->bhw", centred, precision, centred).flatten(1).amax(1)

        limit = worst(normal).max()
        for name, images in defects.items():
            assert worst(images).min() > 1.2 * limit, f"{name} at level {level}"


@pytest.mark.parametrize("levels", [(), (0, 1), (1, 4), (2, 1), (1, 1)])
def test_levels_it_does_not_have_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(BackboneError, match="gabor backbone has no levels"):
        create_backbone("gabor", levels)


def test_options_of_timm_models_are_refused() -> None:
    with pytest.raises(BackboneError, match="no weights to load"):
        create_backbone("gabor", weights="random")
    with pytest.raises(BackboneError, match="float32"):
        create_backbone("gabor", dtype="float16")


def test_images_that_are_too_small_are_refused(fitted: GaborBackbone) -> None:
    with pytest.raises(FeatureError, match=r"63 x 80 pixels are too small .* at least 64"):
        fitted(texture(1, (63, 80)))
