"""Images recognized by the bytes of their files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fastbgad.data import Sample
from fastbgad.data.content import content_digest, image_digests, named_digests
from fastbgad.errors import DataError


def sample(path: Path, content: bytes, mask: Path | None = None) -> Sample:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return Sample(path, mask, int(mask is not None), path.parent.name)


def test_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    samples = [sample(tmp_path / folder / "crack" / "0.png", folder.encode()) for folder in ("a", "b")]
    a, b = (hashlib.sha256(text).hexdigest() for text in (b"a", b"b"))
    assert image_digests(samples) == [a, b]
    assert named_digests(samples) == {"crack/0.png": a, str(samples[1].image): b}
    with pytest.raises(DataError, match=r"nothing.png: .*check the path"):
        image_digests([samples[0]._replace(image=tmp_path / "nothing.png")])


def test_content_is_that_of_images_and_masks_in_their_order(tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "0.png").write_bytes(b"mask")
    one, two = sample(tmp_path / "0.png", b"0", masks), sample(tmp_path / "1.png", b"1", masks / "0.png")
    first = content_digest([one, two])
    elsewhere = sample(tmp_path / "other" / "7.png", b"0", masks / "0.png")
    assert content_digest([elsewhere, two]) == first
    assert content_digest([two, one]) != first
    (masks / "0.png").write_bytes(b"other mask")
    assert content_digest([one, two]) != first
    assert content_digest([]) == hashlib.sha256().hexdigest()
