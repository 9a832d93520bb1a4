"""The throughput meter: options, ceilings, and errors that count as a failed row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbgad.backbones import create_backbone
from fastbgad.bench.images import generate_images
from fastbgad.bench.meter import ThroughputConfig, ThroughputMeter, _reason
from fastbgad.bench.roofline import Ceilings, flow_bytes, flow_flops
from fastbgad.errors import BackboneError, ConfigError, DataError
from tests.bench.conftest import CPU, FLOWS, SIZE


def test_fractions_of_the_ceilings(tmp_path: Path) -> None:
    """The columns that a GPU has, here with ceilings of one operation and one byte a second."""
    config = ThroughputConfig(image_sizes=(SIZE,), batch_sizes=(2,), repeats=1, warmup=0)
    meter = ThroughputMeter(create_backbone("gabor"), config, CPU)
    assert meter.ceilings is None
    meter.ceilings = Ceilings(1.0, 1.0)
    row = meter.row(SIZE, 2, generate_images(tmp_path, SIZE, 0))
    assert row.failed is None
    for name, rows in zip(FLOWS, (256, 64, 16), strict=True):
        stage = row.stages[name]
        seconds = stage.ms_per_image * 2 / 1e3
        assert stage.copy_fraction == pytest.approx(flow_bytes(2 * rows, 32) / seconds)
        assert stage.matrix_fraction == pytest.approx(flow_flops(2 * rows, 32) / seconds)
    scoring = row.stages["scoring"]
    assert scoring.copy_fraction == pytest.approx(2 * 5 * (SIZE**2 + 336) / (scoring.ms_per_image * 2 / 1e3))
    headings, lines = row.table()
    assert headings[-2:] == ["of copy rate", "of matrix rate"]
    assert [line[-2:] for line in lines if line[0] == "backbone"] == [["-", "-"]]


def test_what_counts_as_out_of_memory() -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")):
        assert (_reason(error, CPU) or "").startswith("out of memory on cpu")
    assert _reason(DataError("a.png is empty"), CPU) == "a.png is empty"
    assert _reason(RuntimeError("the size of tensor a must match"), CPU) is None


def test_config() -> None:
    config = ThroughputConfig(image_sizes=(64, 32, 64), batch_sizes=(1, 2, 1))
    assert config.cases == [(64, 1), (64, 2), (32, 1), (32, 2)]
    assert config.timed_passes == 5
    latency = ThroughputConfig(mode="latency", image_sizes=(64,))
    assert (latency.cases, latency.timed_passes) == ([(64, 1)], 100)
    with pytest.raises(ConfigError, match="throughput, latency"):
        ThroughputConfig(mode="speed")
    with pytest.raises(ConfigError, match="no batch size"):
        ThroughputConfig(batch_sizes=())
    with pytest.raises(BackboneError):
        create_backbone("gabor", weights="random")
