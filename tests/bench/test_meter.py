"""`fastbgad bench`: every stage is timed and adds up, bad input costs one message, finished rows are never lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbgad.__main__ import main
from fastbgad.backbones import create_backbone
from fastbgad.bench import images as throughput_images
from fastbgad.bench.images import generate_images, open_images, truth_masks
from fastbgad.bench.meter import ThroughputConfig, ThroughputMeter, _reason
from fastbgad.bench.roofline import Ceilings, flow_bytes, flow_flops
from fastbgad.bench.rows import Row, Stage
from fastbgad.bench.stages import Work
from fastbgad.cli.parser import parse
from fastbgad.data import read_image, write_noise_images
from fastbgad.errors import BackboneError, ConfigError, DataError, OutputError
from tests.make_data import make_btad, make_folder_dataset, make_mvtec, normal_image, save

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


def test_throughput_on_generated_files(tmp_path: Path, capsys) -> None:
    code, found = bench(tmp_path / "a.json", "--batch-size", "1", "3", "9", "--chart", str(tmp_path / "a.png"))
    assert code == 0
    assert found["versions"]["fastbgad"]
    assert found["machine"]["cores"]
    assert found["date"].startswith("20")
    assert found["settings"]["batch_size"] == [1, 3, 9]
    assert found["settings"]["repeats"] == 2
    assert [(row["image_size"], row["batch_size"]) for row in found["rows"]] == [(SIZE, 1), (SIZE, 3), (SIZE, 9)]
    for row in found["rows"]:
        stages, total = row["stages"], row["total"]
        assert list(stages) == STAGES
        assert row["mode"] == "throughput"
        assert row["skipped"] == []
        assert row["failed"] is None
        assert stages["host to device"]["ms_per_image"] is None
        timed = [stage for name, stage in stages.items() if name != "host to device"]
        assert sum(stage["share"] for stage in stages.values()) == pytest.approx(1)
        assert sum(stage["ms_per_image"] for stage in timed) == pytest.approx(total["ms_per_image"])
        for stage in (*timed, total):
            assert stage["images_per_s"] == pytest.approx(1e3 / stage["ms_per_image"])
            assert stage["share"] == pytest.approx(stage["ms_per_image"] / total["ms_per_image"])
            assert stage["peak_mib"] is None or stage["peak_mib"] >= 0
        assert [stages[name]["rows"] for name in FLOWS] == [256, 64, 16]
        assert {stages[name]["channels"] for name in FLOWS} == {32}
    assert Image.open(tmp_path / "a.png").width > 800
    printed = capsys.readouterr().out
    first = printed.splitlines()[0]
    for expected in (f"torch {found['versions']['torch']}", "gabor", "1 whole passes to warm up", "2 timed ones"):
        assert expected in first
    for expected in ("8 generated PNG files of 64 x 64 pixels", "fewer than the batch of 9, so they are repeated"):
        assert expected in printed
    for expected in ("flow 1 (C = 32, 256 rows)", "64 px, batch 3", "peak MiB", "total"):
        assert expected in printed


def test_latency(tmp_path: Path) -> None:
    options = [
        "--mode",
        "latency",
        "--image-size",
        "64",
        "80",
        "--file-size",
        "100",
        "--chart",
        str(tmp_path / "l.svg"),
    ]
    code, found = bench(tmp_path / "l.json", *options)
    assert code == 0
    assert [(row["image_size"], row["batch_size"]) for row in found["rows"]] == [(64, 1), (80, 1)]
    for row in found["rows"]:
        assert list(row["stages"]) == STAGES[:-1]
        assert "100 x 100 pixels, resized to" in row["images"]
        assert row["total"]["p50_ms"] == row["total"]["ms_per_image"]
        assert row["total"]["p99_ms"] >= row["total"]["p50_ms"]
        assert sum(stage["share"] for stage in row["stages"].values()) == pytest.approx(1)
    assert "99th percentile" not in (tmp_path / "l.json").read_text()
    assert (tmp_path / "l.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("make", [make_mvtec, make_btad, make_folder_dataset])
def test_datasets_with_masks(tmp_path: Path, make) -> None:
    """Test images are taken; an image with a mask keeps it, the others get one, so that metrics are defined."""
    make(tmp_path, size=SIZE)
    images = open_images(tmp_path, None, "auto", 4, seed=0)
    assert {sample.label for sample in images.samples} == {0, 1}
    masks = truth_masks(images, 32, seed=0)
    assert masks.shape == (len(images.samples), 32, 32)
    assert all(mask.any() and not mask.all() for mask in masks)
    for mask, sample in zip(masks, images.samples, strict=True):
        if sample.mask is not None:
            drawn = np.asarray(Image.open(sample.mask)) > 0
            assert mask.float().mean() == pytest.approx(drawn.mean(), abs=0.06)
    code, found = bench(tmp_path / "d.json", "--data", str(tmp_path), "--batch-size", "2")
    assert code == 0
    assert list(found["rows"][0]["stages"]) == STAGES


def test_mixed_sizes_and_fewer_images_than_the_batch(tmp_path: Path, capsys) -> None:
    folder = photos(tmp_path / "photos", (70, 90), (100, 64), (64, 64))
    code, found = bench(tmp_path / "m.json", "--data", str(folder), "--batch-size", "2", "4")
    assert code == 0
    about = "3 images of 64 x 64 to 90 x 100 pixels, of mixed sizes, resized to 64 x 64"
    assert [row["images"] for row in found["rows"]] == [
        about,
        f"{about}; fewer than the batch of 4, so they are repeated",
    ]
    assert about in capsys.readouterr().out
    one = open_images(folder / "2.png", None, "auto", 1, seed=0)
    assert one.describe(SIZE, 1) == "1 image of 64 x 64 pixels"


def test_an_unreadable_image_is_left_out_and_named(tmp_path: Path, capsys) -> None:
    folder = photos(tmp_path / "photos", (64, 64), (64, 64), (64, 64))
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    code, found = bench(tmp_path / "u.json", "--data", str(folder), "--batch-size", "1", "2")
    assert code == 0
    for row in found["rows"]:
        (message,) = row["skipped"]
        assert "1.png is damaged" in message
    assert "left out because they cannot be read (1)" in capsys.readouterr().out
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 3 images"):
        open_images(folder, None, "auto", 1, seed=0)


def test_a_mask_that_cannot_be_read(tmp_path: Path) -> None:
    folder = make_mvtec(tmp_path, size=SIZE)
    (folder / "ground_truth" / "dent" / "001_mask.png").write_bytes(b"")
    images = open_images(tmp_path, "widget", "mvtec", 8, seed=0)
    assert len(images.samples) == 5
    assert "001_mask.png is empty" in images.skipped[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "8", "0"], "the batch size is 0; it must be at least 1"),
        (["--image-size", "0"], "the image size is 0; it must be at least 1"),
        (["--file-size", "0"], "0 pixels a side"),
        (["--repeats", "0"], "repeats is 0"),
        (["--backbone", "resnet1800"], "resnet1800"),
        (["--levels", "7"], "levels [7]"),
        (["--dtype", "float16"], "gabor backbone runs in float32"),
        (["--device", "cuda:99"], "not on this machine"),
        (["--impl", "triton"], "the kernels run on CUDA tensors"),
        (["--chart", "bench.pdf"], "neither .png nor .svg"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--category", "screw", "--data", "."], "no category"),
    ],
)
def test_one_clear_error(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        open_images(tmp_path / "empty", None, "auto", 1, seed=0)


def test_output_that_cannot_be_written_is_found_first(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main([*TINY, "--json", str(tmp_path / "file" / "a.json")]) == 2
    assert "cannot create the folder" in capsys.readouterr().err


def test_a_size_too_small_for_the_backbone_costs_only_its_row(tmp_path: Path, capsys) -> None:
    code, found = bench(tmp_path / "s.json", "--image-size", "32", "64", "--batch-size", "1")
    assert code == 2
    assert "each side needs at least 64" in found["rows"][0]["failed"]
    assert found["rows"][0]["stages"] == found["rows"][0]["total"] == {}
    assert list(found["rows"][1]["stages"]) == STAGES
    assert "32 px, batch 1: failed: images of 32 x 32 pixels are too small" in capsys.readouterr().out


def test_out_of_memory_costs_only_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract = Work._extract

    def limited(self: Work) -> None:
        if len(self.images) == 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes.\nmore")
        extract(self)

    monkeypatch.setattr(Work, "_extract", limited)
    chart = tmp_path / "o.png"
    code, found = bench(tmp_path / "o.json", "--batch-size", "1", "2", "3", "--chart", str(chart))
    assert code == 2
    assert [bool(row["failed"]) for row in found["rows"]] == [False, True, False]
    assert found["rows"][1]["failed"].startswith("out of memory on cpu")
    assert "\n" not in found["rows"][1]["failed"]
    assert chart.is_file()


def test_what_counts_as_out_of_memory() -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")):
        assert (_reason(error, CPU) or "").startswith("out of memory on cpu")
    assert _reason(DataError("a.png is empty"), CPU) == "a.png is empty"
    assert _reason(RuntimeError("the size of tensor a must match"), CPU) is None


def test_a_bug_is_not_taken_for_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Work) -> None:
        raise RuntimeError("the size of tensor a must match")

    monkeypatch.setattr(Work, "_extract", broken)
    with pytest.raises(RuntimeError, match="must match"):
        main(TINY)


def test_an_interruption_keeps_finished_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    measured = ThroughputMeter.row

    def until_the_second(self: ThroughputMeter, side: int, batch: int, *more: object) -> Row:
        if batch == 2:
            raise KeyboardInterrupt
        return measured(self, side, batch, *more)

    monkeypatch.setattr(ThroughputMeter, "row", until_the_second)
    code, found = bench(tmp_path / "i.json", "--batch-size", "1", "2", "3")
    assert code == 130
    assert [row["batch_size"] for row in found["rows"]] == [1]
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["i.json"]


def test_seeds(tmp_path: Path) -> None:
    one, again, other = (
        generate_images(tmp_path / name, 64, seed).samples for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    pixels = [[read_image(sample.image) for sample in samples] for samples in (one, again, other)]
    assert all(np.array_equal(a, b) for a, b in zip(pixels[0], pixels[1], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(pixels[0], pixels[2], strict=True))
    assert not np.array_equal(pixels[0][0], pixels[0][1])
    folder = photos(tmp_path / "photos", *[(8, 8)] * 40)
    chosen = [[s.image.name for s in open_images(folder, None, "auto", 20, seed).samples] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 20


def test_generated_files_cost_as_much_as_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About half a byte per value, as photographs of textures have; noise would take a whole one."""
    (path,) = write_noise_images(tmp_path, 1, 512)
    assert 0.4 < path.stat().st_size / (512 * 512 * 3) < 0.65
    image = read_image(path).astype(float)
    assert 20 < image.std() < 80
    assert np.abs(np.diff(image, axis=0)).mean() < 8
    monkeypatch.setattr(throughput_images, "_GENERATED_PIXELS", 3 * 64**2)
    assert [len(generate_images(tmp_path / "large", side, 0).samples) for side in (16, 64, 128)] == [8, 3, 2]
    with pytest.raises(ConfigError, match="side 0"):
        write_noise_images(tmp_path, 1, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create"):
        write_noise_images(tmp_path / "file" / "x", 1, 8)


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


def test_tables() -> None:
    stages = {
        "decode": Stage(12.345, 0.25, 3.21),
        "host to device": Stage(None),
        "flow 1": Stage(0.5, 0.75, channels=8, rows=9),
    }
    row = Row(64, 2, "throughput", "", stages, Stage(123.4, 1.0))
    assert row.table() == (
        ["stage", "ms per image", "images/s", "share", "peak MiB"],
        [
            ["decode", "12.3", "81.0", "25.0%", "3.2"],
            ["host to device", "-", "-", "-", "-"],
            ["flow 1 (C = 8, 9 rows)", "0.5", "2000", "75.0%", "-"],
            ["total", "123", "8.10", "100.0%", "-"],
        ],
    )
    latency = replace(row, mode="latency", total=Stage(1.0, 1.0, p99_ms=2.0), stages={})
    assert latency.table()[1] == [["total", "1.00", "2.00", "100.0%", "-"]]


def test_a_model_of_timm_and_other_levels(tmp_path: Path) -> None:
    code, found = bench(
        tmp_path / "t.json", "--backbone", "resnet18", "--levels", "1", "2", "--batch-size", "1", "--weights", "random"
    )
    assert code == 0
    stages = found["rows"][0]["stages"]
    assert {name: stages[name]["channels"] for name in stages if "flow" in name} == {"flow 1": 64, "flow 2": 128}


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


def test_help_teaches(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["bench", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for expected in ("fastbgad bench --mode latency", "--batch-size", "--file-size", "--json", "default"):
        assert expected in printed


def test_several_categories_need_a_choice(tmp_path: Path) -> None:
    for name in ("nut", "screw"):
        make_mvtec(tmp_path, name, size=SIZE)
    with pytest.raises(DataError, match="choose one of nut, screw"):
        open_images(tmp_path, None, "auto", 1, seed=0)
    assert open_images(tmp_path, "nut", "auto", 1, seed=0).samples[0].image.is_relative_to(tmp_path / "nut")
    save(tmp_path / "loose" / "a.png", normal_image(np.random.default_rng(0), 8))
    with pytest.raises(DataError, match="no category was found"):
        open_images(tmp_path / "loose", None, "mvtec", 1, seed=0)
