"""The performance page, from made-up result files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import page
import page_plots
import pytest

FREIA, OURS, KERNELS = "FrEIA 0.2 eager", "fastbgad torch", "fastbgad triton"
NO_GPU = {"skipped": "the kernels need a CUDA GPU"}
SVG = "{http://www.w3.org/2000/svg}"


def result(name: str, times: dict[str, float], others: dict[str, Any] | None = None, **sizes: int) -> dict[str, Any]:
    """One comparison as the harness stamps it; peak memory is twice the time."""
    base = times[FREIA]
    entries = {
        contender: {
            "error": 2e-6,
            "median_ms": ms,
            "fastest_ms": ms,
            "speed": base / ms,
            "images_per_s": 1e3 / ms,
            "peak_mib": 2 * ms,
        }
        for contender, ms in times.items()
    }
    return {
        "name": name,
        "baseline": FREIA,
        "sizes": sizes,
        "images": 1,
        "rounds": 9,
        "contenders": entries | (others or {}),
        "date": "2026-02-03",
        "commit": "0123abc",
        "machine": "Some CPU, AVX2, 2 threads",
        "versions": {"torch": "2.11.0"},
    }


def by_rows(*counts: int) -> list[dict[str, Any]]:
    return [
        result(f"flow, {n} rows", {FREIA: n / 10, OURS: n / 30}, {KERNELS: NO_GPU}, rows=n, channels=40) for n in counts
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path


def keep(folder: Path, results: object, name: str = "cpu.json") -> Path:
    path = folder / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results))
    return path


def run(folder: Path, *arguments: str) -> int:
    return page.main(["--results", str(folder / "results"), "--folder", str(folder), *arguments])


def text(folder: Path) -> str:
    assert run(folder) == 0
    return (folder / "README.md").read_text()


def section(written: str, title: str) -> str:
    return written.split(f"\n## {title}\n")[1].split("\n## ")[0]


def gpu_run(**entries: Any) -> dict[str, Any]:
    """A file of `make gpu` with one case."""
    case = {"name": "flow, 64 rows", "baseline": "eager FrEIA", "notes": [], "contenders": entries, "floor_us": 10.0}
    refused = {"name": "boundary, 64 rows", "refused": "the equivalence tests of boundary failed"}
    return {
        "measured": True,
        "date": "2026-02-04 10:00 UTC",
        "commit": "4567def",
        "changed_files": False,
        "machine": {"gpu": "Some GPU, 80 GiB"},
        "driver": "1.2",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "equivalence": {"flow": {"passed": 5, "failed": []}},
        "ceilings": {"copy_bytes_per_second": 1e9, "matrix_flops_per_second": 2e12},
        "cases": [case, refused],
    }


def gpu_entry(microseconds: float) -> dict[str, Any]:
    return {
        "relative_error": 1e-5,
        "median_us": microseconds,
        "low_us": microseconds,
        "high_us": microseconds,
        "rounds": 30,
        "peak_bytes": 3 << 20,
        "speed": 400 / microseconds,
        "fraction_of_floor": 10 / microseconds,
    }


def test_without_results_it_says_so(folder: Path) -> None:
    written = text(folder)
    for title in ("Measured", "How times grow", "Memory"):
        assert section(written, title).strip().startswith("Not yet measured"), title
    assert "There is no result file of a GPU yet" in section(written, "Not yet measured")
    assert "three levels of a 1024-pixel image" in section(written, "Not yet measured")
    assert not (folder / "pictures").exists()


def test_floors(folder: Path) -> None:
    """65536 rows of 40 channels: 20.1 GFLOP at 989 TFLOP/s are 20.3 us, and at 121 TFLOP/s 166 us."""
    written = section(text(folder), "Arithmetic, memory traffic and floors")
    assert "| 1024 px | 40 | 65536 | 20.1 | 10.7 | 1869 | 20.3 | 20.3 | 64.4 | 166 |" in written
    assert "| 40 | 306560 | 915968 | 2.99 | 885440 | 2634688 | 2.98 |" in written
    for chip in ("H200", "H100 SXM", "A100 80 GB", "L4"):
        assert f"\n| {chip} | " in written


def test_every_contender_and_every_reason(folder: Path) -> None:
    others = {KERNELS: NO_GPU, "fastbgad <b>": {"failed": "OSError: no | luck"}}
    keep(folder, [result("flow, one image", {FREIA: 300.0, OURS: 100.0}, others, pixels=256)])
    written = section(text(folder), "Measured")
    assert "### Some CPU, AVX2, 2 threads" in written
    assert "(results/cpu.json)" in written
    assert f"| {FREIA} | 300 | 1.00x | 2e-06 | 3.33 | 600 |" in written
    assert f"| **{OURS}** | 100 | 3.00x | 2e-06 | 10.0 | 200 |" in written
    assert r"Failed: fastbgad &lt;b&gt; (OSError: no \| luck)." in written
    assert f"Skipped: {KERNELS} (the kernels need a CUDA GPU)." in written
    assert "2026-02-03, commit 0123abc, torch 2.11.0" in written
    assert f"against {FREIA}; 9 rounds" in written
    never = section(text(folder), "Not yet measured")
    assert f"| {KERNELS} | 1 | skipped: the kernels need a CUDA GPU |" in never
    assert f"| {OURS} |" not in never


def test_families(folder: Path) -> None:
    """Three sizes make a picture, also where another size differs elsewhere; two do not, nor where all sizes differ."""
    batches = [
        result(f"images, {b} of {p}", {FREIA: 9.0 * p * b, OURS: 5.0 * p * b}, pixels=p, batch=b)
        for p, b in ((256, 1), (256, 8), (512, 1), (1024, 1))
    ]
    levels = [
        result(f"level, {n} rows, {c}", {FREIA: 9.0, OURS: 5.0}, rows=n, channels=c)
        for n, c in ((9, 40), (8, 72), (7, 200))
    ]
    pair = [result(f"pair, {n} rows", {FREIA: 9.0, OURS: 5.0}, rows=n) for n in (10, 20)]
    # A size that follows from another one is none of its own.
    derived = [result(f"large, {p}", {FREIA: 9.0 * p}, pixels=p, gigaflops=7 * p) for p in (30, 20, 10)]
    found = page_plots.families([*by_rows(256, 1024, 4096), *batches, *levels, *pair, *derived])
    assert [(f.name, f.axis, f.constant, [r["sizes"][f.axis] for r in f.results]) for f in found] == [
        ("flow", "rows", {"channels": 40}, [256, 1024, 4096]),
        ("images", "pixels", {"batch": 1}, [256, 512, 1024]),
        ("large", "pixels", {}, [10, 20, 30]),
    ]


def test_two_comparisons_of_one_size_make_no_line() -> None:
    assert page_plots.families([*by_rows(10, 20, 40), *by_rows(40)]) == []


def test_pictures(folder: Path) -> None:
    results = by_rows(256, 1024, 4096)
    results[0]["contenders"]["only once"] = results[0]["contenders"][OURS]
    results[2]["contenders"][OURS] = {"failed": "out of memory"}
    keep(folder, results)
    written = text(folder)
    names = ["cpu-flow-by-rows-40-channels.svg", "cpu-flow-by-rows-40-channels-memory.svg"]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == sorted(names)
    assert f'src="pictures/{names[0]}"' in section(written, "How times grow")
    assert f'src="pictures/{names[1]}"' in section(written, "Memory")
    assert "for want of a second point: only once" in section(written, "How times grow")
    for name in names:
        drawn = ElementTree.parse(folder / "pictures" / name)
        shown = ["".join(element.itertext()).strip() for element in drawn.iter(f"{SVG}text")]
        assert {FREIA, OURS, "256", "1024", "4096", "flow by rows", "rows (patches)"} <= set(shown)
        assert not {"only once", KERNELS} & set(shown)


def test_the_same_results_give_the_same_bytes(folder: Path) -> None:
    keep(folder, by_rows(256, 1024, 4096))
    first, second = (page.page(page.read_sources(folder / "results")) for _ in range(2))
    assert first == second
    assert len(first) == 3
    assert not any(f"{year}-" in first[name] for name in first if name.endswith(".svg") for year in range(2024, 2040))


def test_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(folder, by_rows(256, 1024, 4096))
    assert run(folder, "--check") == 1
    assert "README.md is missing" in capsys.readouterr().err
    assert run(folder) == 0
    assert run(folder, "--check") == 0
    readme, picture = folder / "README.md", folder / "pictures" / "cpu-flow-by-rows-40-channels.svg"
    before = readme.read_text()
    readme.write_text(before.replace("3.00x", "9.00x", 1))
    picture.write_text(picture.read_text() + "\n")
    (folder / "pictures" / "old.svg").write_text("<svg/>")
    capsys.readouterr()
    assert run(folder, "--check") == 1
    said = capsys.readouterr().err
    assert "make bench-page" in said
    assert "README.md differs, first at: -| **fastbgad torch**" in said
    assert f"pictures/{picture.name} differs" in said
    assert "pictures/old.svg does not belong" in said
    assert readme.read_text() != before  # it only looked
    assert run(folder) == 0
    assert run(folder, "--check") == 0


@pytest.mark.parametrize(
    "content",
    [
        "[{",
        "{}x",
        '{"name": "x"}',
        "[3]",
        '[{"name": "x", "machine": "y"}]',
        '[{"name": "x", "machine": "y", "contenders": {"a": {"median_ms": "fast"}}}]',
        '[{"name": "x", "machine": "y", "contenders": {"a": {}}}]',
        '[{"name": "x", "machine": "y", "contenders": {}, "sizes": {"rows": 0}}]',
    ],
)
def test_a_damaged_file_is_named(folder: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = folder / "results" / "cpu.json"
    path.write_text(content)
    assert run(folder) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} is damaged")
    assert said.count("\n") == 1
    assert not (folder / "README.md").exists()


def test_a_damaged_gpu_file_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = gpu_run(kernel={"median_us": 3.0})
    path = keep(folder, content, "gpu/2026-02-04-1000-a.json")
    assert run(folder) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


def test_newest_gpu_file(folder: Path) -> None:
    old = gpu_run(**{"eager FrEIA": gpu_entry(1.0)})
    new = gpu_run(**{"eager FrEIA": gpu_entry(400.0), KERNELS: gpu_entry(40.0), "compiled FrEIA": {"failed": "no gcc"}})
    keep(folder, old, "some_gpu/2026-01-01-1000-a.json")
    keep(folder, new, "some_gpu/2026-02-04-1000-b.json")
    keep(folder, new | {"measured": False}, "some_gpu/2026-03-01-1000-c.json")
    keep(folder, new | {"measured": False}, "dry_run/2026-03-01-1000-c.json")
    written = text(folder)
    measured = section(written, "Measured")
    assert measured.count("### Some GPU, 80 GiB") == 1
    assert "(results/some_gpu/2026-02-04-1000-b.json)" in measured
    assert f"| **{KERNELS}** | 0.0400 | 10.00x | 1e-05 | 3.0 | 25% |" in measured
    assert "Failed: compiled FrEIA (no gcc)." in measured
    assert "Not timed: the equivalence tests of boundary failed." in measured
    assert "Equivalence tests of flow: 5 passed, 0 failed." in measured
    # Its own rates: 2 TFLOP/s and 1 GB/s make memory the limit, 10.7 MB in 10.7 ms.
    floors = section(written, "Arithmetic, memory traffic and floors")
    assert "| Some GPU, 80 GiB | 2.00 | 0.0010 | 2000 | measured," in floors
    assert "| 10748 † |" in floors
    assert "no result file of a GPU" not in section(written, "Not yet measured")


def test_rates_of_a_cpu(folder: Path) -> None:
    results = by_rows(256)
    results[0]["ceilings"] = {"copy_bytes_per_second": 20e9, "matrix_flops_per_second": 200e9}
    keep(folder, results)
    assert "| Some CPU, AVX2, 2 threads | 0.200 | 0.0200 | 10 | measured, `results/cpu.json` |" in text(folder)


@pytest.mark.parametrize(
    ("wanted", "gap", "heights"),
    [
        ([0.2, 0.8], 0.1, [0.2, 0.8]),
        ([0.5, 0.5, 0.1], 0.1, [0.5, 0.6, 0.1]),
        ([1.0, 0.95, 0.9], 0.1, [1.0, 0.9, 0.8]),
        ([0.5, 0.5, 0.5], 0.9, [0.0, 0.5, 1.0]),
        ([0.3], 0.1, [0.3]),
    ],
)
def test_spread(wanted: list[float], gap: float, heights: list[float]) -> None:
    assert page_plots.spread(wanted, gap) == pytest.approx(heights)


@pytest.mark.parametrize(("low", "high"), [(1.0, 5.0), (0.03, 0.2), (20.0, 1400.0), (1e-3, 1e9), (0.26, 1.31)])
def test_round_marks(low: float, high: float) -> None:
    marks = page_plots.round_marks(low, high)
    assert 2 <= len(marks) <= 8
    assert all(low <= mark <= high for mark in marks)
