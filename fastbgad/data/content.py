"""Images recognized by the bytes of their files, because names recur: every lot of a product has a crack/000.png."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import DataError
from ..system.files import sha256
from .sample import Sample

_THREADS = 8


def image_digests(samples: Sequence[Sample]) -> list[str]:
    """Return the SHA-256 of every sample's image file, in 64 hexadecimal digits; raise `DataError` as for no file."""
    # Hashing and reading leave the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda sample: _digest(sample.image), samples))


def named_digests(samples: Sequence[Sample]) -> dict[str, str]:
    """Return the SHA-256 of every sample's image file by the sample's name, or by its path where the name recurs.

    Raises:
        DataError: a file cannot be read.
    """
    digests: dict[str, str] = {}
    for sample, digest in zip(samples, image_digests(samples), strict=True):
        digests[str(sample.image) if sample.name in digests else sample.name] = digest
    return digests


def content_digest(samples: Sequence[Sample]) -> str:
    """Return one SHA-256 of all images and masks of the samples, in their order; names and folders do not count.

    Raises:
        DataError: a file cannot be read.
    """
    paths = [path for sample in samples for path in (sample.image, *_mask_files(sample))]
    with ThreadPoolExecutor(_THREADS) as pool:
        return hashlib.sha256("".join(pool.map(_digest, paths)).encode()).hexdigest()


def _mask_files(sample: Sample) -> list[Path]:
    """Return the files of a sample's mask, which may be a folder."""
    if sample.mask is None:
        return []
    return sorted(path for path in sample.mask.rglob("*") if path.is_file()) if sample.mask.is_dir() else [sample.mask]


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise DataError(f"cannot read the image {path}: {error.strerror}; check the path and its rights") from error
