"""A single Gaussian per feature level: the floor that a flow on the same features may not miss.

With the mean m and the covariance S of all training patches of a level of C channels, a patch x has the score

    d(x) = (x - m)^T (S + r I)^-1 (x - m) / C,        r = RIDGE * mean of the diagonal of S

and a pixel the sum over levels of the bilinearly upsampled scores. On average a training patch scores just below 1 at
every level. The covariance is full, its arithmetic float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastbgad.errors import FeatureError
from fastbgad.features import FeatureStore

RIDGE = 1e-4
_IMAGES_AT_ONCE = 16


class LevelGaussian(NamedTuple):
    """The Gaussian of a level: its mean, and the lower triangular L with L L^T = covariance + ridge."""

    mean: Tensor  # [C] float64
    factor: Tensor  # [C, C] float64

    def distances(self, rows: Tensor) -> Tensor:
        """Return the squared Mahalanobis distance / C of rows [N, C], as float64 [N]."""
        white = torch.linalg.solve_triangular(self.factor, (rows.double() - self.mean).T, upper=False)  # [C, N]
        return white.square().mean(dim=0)


def fit_gaussian(parts: Sequence[Tensor]) -> LevelGaussian:
    """Return the Gaussian of rows given in parts [N_i, C]; at least two rows in all.

    Raises:
        FeatureError: rows that are all the same, or not finite.
    """
    count = sum(len(part) for part in parts)
    mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / count
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in parts:
        centered = part.double() - mean
        scatter += centered.T @ centered
    covariance = scatter / max(1, count - 1)
    ridge = RIDGE * covariance.diagonal().mean()
    if not ridge > 0 or not torch.isfinite(covariance).all():
        raise FeatureError(
            "the training features have no finite variance, so no Gaussian fits them; check that the training images "
            "differ and that the backbone has its weights"
        )
    return LevelGaussian(mean, torch.linalg.cholesky(covariance + ridge * torch.eye(len(mean), dtype=torch.float64)))


def gaussian_maps(
    store: FeatureStore, normals: Sequence[int], test: Sequence[int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return maps [n, H, W] and their maxima [n], float32, of the images in the slots `test`.

    The Gaussians are those of the images in the slots `normals`.
    """
    total = torch.zeros(len(test), *size)
    for level, (_, height, width) in enumerate(store.shapes):
        gaussian = fit_gaussian([_rows(store, level, part) for part in _parts(normals)])
        scores = [gaussian.distances(_rows(store, level, part)) for part in _parts(test)]
        planes = torch.cat(scores).float().view(-1, 1, height, width)
        total += interpolate(planes, size, mode="bilinear", align_corners=False)[:, 0]
    return total, total.amax(dim=(1, 2))


def _parts(slots: Sequence[int]) -> list[Sequence[int]]:
    return [slots[start : start + _IMAGES_AT_ONCE] for start in range(0, len(slots), _IMAGES_AT_ONCE)]


def _rows(store: FeatureStore, level: int, slots: Sequence[int]) -> Tensor:
    return store.maps(level, slots).permute(0, 2, 3, 1).flatten(0, 2).cpu()
