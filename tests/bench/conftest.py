"""Photographs and a tiny `fastbgad bench` for the tests of throughput."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from fastbgad.__main__ import main
from tests.make_data import save

CPU = torch.device("cpu")
SIZE = 64
TINY = ["bench", "--backbone", "gabor", "--image-size", str(SIZE), "--repeats", "2", "--warmup", "1", "--device", "cpu"]
FLOWS = ["flow 1", "flow 2", "flow 3"]
STAGES = ["decode", "host to device", "backbone", *FLOWS, "scoring", "metrics"]


def photos(folder: Path, *sides: tuple[int, int]) -> Path:
    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate(sides):
        save(folder / f"{index}.png", rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
    return folder


def bench(path: Path, *more: str) -> tuple[int, dict]:
    code = main([*TINY, "--json", str(path), *more])
    return code, json.loads(path.read_text())
