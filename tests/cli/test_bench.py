"""`fastbgad bench`: every stage is timed and adds up, bad input costs one message, finished rows are never lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbgad.__main__ import main
from fastbgad.bench.images import open_images, truth_masks
from fastbgad.bench.meter import ThroughputMeter
from fastbgad.bench.rows import Row
from fastbgad.bench.stages import Work
from fastbgad.cli.parser import parse
from fastbgad.errors import DataError
from tests.bench.conftest import FLOWS, SIZE, STAGES, TINY, bench, photos
from tests.make_data import make_btad, make_folder_dataset, make_mvtec


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


def test_a_model_of_timm_and_other_levels(tmp_path: Path) -> None:
    code, found = bench(
        tmp_path / "t.json", "--backbone", "resnet18", "--levels", "1", "2", "--batch-size", "1", "--weights", "random"
    )
    assert code == 0
    stages = found["rows"][0]["stages"]
    assert {name: stages[name]["channels"] for name in stages if "flow" in name} == {"flow 1": 64, "flow 2": 128}


def test_help_teaches(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["bench", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for expected in ("fastbgad bench --mode latency", "--batch-size", "--file-size", "--json", "default"):
        assert expected in printed
