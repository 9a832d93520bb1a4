"""Tile sizes: where they come from, the notice for an untuned GPU, and the tuning command."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastbgad.kernels import score_map as score_map_kernels
from fastbgad.kernels import tile_sizes as tiles_module
from fastbgad.kernels import tune
from fastbgad.kernels.tile_sizes import (
    CONFIGS,
    TilesError,
    UntunedGPUWarning,
    default_tiles,
    read_tuned,
    tiles,
    use_tiles,
)
from fastbgad.kernels.tune.command import require_writable
from fastbgad.kernels.variants import MODULES, TuningCase

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GPU_NAME = "NVIDIA H100 80GB HBM3"
DEFAULT = {"TH": 8, "TW": 64, "num_warps": 4}
OTHER = {"TH": 2, "TW": 32, "num_warps": 1}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch) -> Iterator[None]:
    """Nothing read before, nothing chosen, no notice given."""
    monkeypatch.setattr(tiles_module, "_noticed", False)
    use_tiles(None)
    yield
    use_tiles(None)


@pytest.fixture
def configs(monkeypatch, tmp_path: Path) -> Path:
    """A folder of tuned files for a GPU that is not there."""
    monkeypatch.setattr(tiles_module, "CONFIGS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU_NAME)
    return tmp_path


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_default_on_the_cpu_without_a_notice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles("score_map", "map", CPU) == DEFAULT


def test_the_result_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        tiles("score_map", "map", CPU)["TH"] = 1  # type: ignore[index]


def test_an_untuned_gpu_is_noticed_once(configs: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for key in ("map", "map"):
            assert tiles("score_map", key, GPU) == DEFAULT
        assert tiles("score_map", "map", torch.device("cuda", 1)) == DEFAULT
        tiles_module.forget()
        tiles("score_map", "map", GPU)
    assert [warning.category for warning in caught] == [UntunedGPUWarning]
    assert GPU_NAME in str(caught[0].message)
    assert "python -m fastbgad.kernels.tune" in str(caught[0].message)


def test_the_file_of_the_gpu_is_taken_and_what_it_lacks_is_the_default(configs: Path) -> None:
    path = write(configs / "nvidia_h100_80gb_hbm3.json", {"tiles": {"score_map": {"map": OTHER}}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles("score_map", "map", GPU) == OTHER
        write(path, {"tiles": {}})
        assert tiles("score_map", "map", GPU) == OTHER  # read once
        tiles_module.forget()
        assert tiles("score_map", "map", GPU) == DEFAULT


def test_a_file_chosen_by_the_user(tmp_path: Path) -> None:
    use_tiles(write(tmp_path / "mine.json", {"tiles": {"score_map": {"map": OTHER}}}))
    assert tiles("score_map", "map", CPU) == OTHER
    with pytest.raises(TilesError, match=r"absent\.json"):
        use_tiles(tmp_path / "absent.json")
    assert tiles("score_map", "map", CPU) == OTHER
    use_tiles(None)
    assert tiles("score_map", "map", CPU) == DEFAULT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ({"score_map": {"map": OTHER}}, 'has no "tiles"'),
        ({"tiles": []}, "the tiles must be a JSON object"),
        ({"tiles": {"score_map": 3}}, "score_map must be a JSON object"),
        ({"tiles": {"score_map": {"map": [8, 64]}}}, "score_map / map must be a JSON object"),
        ({"tiles": {"score_map": {"map": {**OTHER, "TH": 2.5}}}}, "TH is 2.5, not a whole number"),
        ({"tiles": {"score_map": {"map": {**OTHER, "TH": -1}}}}, "TH is -1, not a whole number"),
        ({"tiles": {"score_map": {"map": {"BM": 8}}}}, "has BM where the kernel takes TH, TW, num_warps"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(TilesError, match=message) as raised:
        use_tiles(write(tmp_path / "broken.json", content))
    assert str(tmp_path / "broken.json") in str(raised.value)


def test_an_unknown_entry() -> None:
    with pytest.raises(TilesError, match=r"default\.json has no entry score_map / maps"):
        tiles("score_map", "maps", CPU)


def test_every_packaged_file_is_valid() -> None:
    default = default_tiles()
    assert default["score_map"]["map"] == DEFAULT
    for path in CONFIGS.glob("*.json"):
        if path.name != "default.json":
            assert set(read_tuned(path)) <= set(default)
            assert path.stem == tiles_module.slug(json.loads(path.read_text())["measured_on"]["gpu"])


def test_the_configs_are_resources_of_the_package() -> None:
    """Also in a checkout, where the package lies elsewhere than its name says."""
    from importlib.resources import files

    assert json.loads((files("fastbgad.kernels") / "configs" / "default.json").read_text())


# --- the tuning command ----------------------------------------------------------------------------------------------

SLOW, FAST, WRONG, FAILING = (
    {"TH": 4, "TW": 4, "num_warps": 1},
    {"TH": 8, "TW": 16, "num_warps": 1},
    {"TH": 8, "TW": 8, "num_warps": 1},
    {"TH": 3, "TW": 4, "num_warps": 1},  # not a power of two: Triton refuses it
)


class FakeClock:
    """Times runs by their tiles; whatever was timed is kept."""

    def __init__(self, microseconds: Callable[[Mapping[str, int]], float]) -> None:
        self.microseconds = microseconds
        self.readings: list[Mapping[str, int]] = []

    def __call__(self, run: Callable[[], object]) -> Callable[[], float]:
        (sizes,) = run.args  # type: ignore[attr-defined]

        def measure() -> float:
            self.readings.append(sizes)
            return self.microseconds(sizes)

        return measure


def small_case(device: torch.device, candidates: Sequence[Mapping[str, int]]) -> TuningCase:
    """The kernel itself on a tiny map, but for WRONG, whose map is off by a thousandth."""

    def prepare(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        lp = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).to(device)
        zero = torch.zeros(1, device=device)

        def run(sizes: Mapping[str, int]) -> Sequence[Tensor]:
            anomaly_map, score = score_map_kernels.score_map([lp], (9, 11), zero, zero, sizes)
            return (anomaly_map * (1.001 if sizes == WRONG else 1), score)

        return run

    return TuningCase("score_map", "map", candidates, prepare)


def test_the_fastest_right_candidate_is_stored(device: torch.device, tmp_path: Path) -> None:
    clock = FakeClock(lambda sizes: {4: 30.0, 16: 10.0, 8: 1.0}.get(sizes["TW"], 20.0))
    lines: list[str] = []
    case = small_case(device, [SLOW, FAST, WRONG, FAILING])
    kept: list[tune.Tuned] = []
    (result,) = tune.tune([case], device, clock, rounds=3, say=lines.append, keep=kept.append)
    assert kept == [result]
    assert result.chosen == FAST
    assert (result.default_microseconds, result.microseconds) == (20.0, 10.0)
    assert clock.readings == 3 * [DEFAULT, SLOW, FAST]  # in turns, the default first
    reasons = {tuple(sizes.values()): reason for sizes, reason in result.refused}
    assert "differs from that of the default tiles by 1.0e-03" in reasons[tuple(WRONG.values())]
    assert "power of 2" in reasons[tuple(FAILING.values())]
    assert lines[0].startswith("[1/1] score_map / map: TH=8 TW=16")
    assert "2.00x" in tune.result_table([result])

    path = tmp_path / "nvidia_test.json"
    tune.store(path, [result], {"gpu": "NVIDIA Test"})
    use_tiles(path)
    assert tiles("score_map", "map", CPU) == FAST
    stored = json.loads(path.read_text())
    assert stored["measured_on"] == {"gpu": "NVIDIA Test"}
    assert stored["microseconds"]["score_map"]["map"] == {"default": 20.0, "chosen": 10.0}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing temporary is left

    # Other entries of the same GPU stay, those of another GPU do not.
    write(path, {**stored, "tiles": {**stored["tiles"], "flow": {"C8": {"BM": 16}}}})
    tune.store(path, [result], {"gpu": "NVIDIA Test"})
    assert set(read_tuned(path)) == {"score_map", "flow"}
    tune.store(path, [result], {"gpu": "NVIDIA Other"})
    assert set(read_tuned(path)) == {"score_map"}


def test_a_gain_within_the_noise_changes_nothing(device: torch.device) -> None:
    clock = FakeClock(lambda sizes: 10.0 if sizes == DEFAULT else 9.9)
    (result,) = tune.tune([small_case(device, [FAST])], device, clock, rounds=1, say=lambda line: None)
    assert result.chosen == DEFAULT


def test_no_time_and_no_candidate(device: torch.device) -> None:
    lines: list[str] = []
    clock = FakeClock(lambda sizes: 1.0)
    assert tune.tune([small_case(device, [])], device, clock, seconds=-1, say=lines.append) == []
    assert "left out" in lines[0]

    def prepare(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        def run(sizes: Mapping[str, int]) -> Sequence[Tensor]:
            raise RuntimeError("out of resource: shared memory")

        return run

    assert tune.tune([TuningCase("score_map", "map", [FAST], prepare)], device, clock, say=lines.append) == []
    assert "no candidate runs" in lines[1]


def test_the_most_valuable_entries_come_first() -> None:
    """Whatever ends a tuning, what users wait for most is done; all others follow."""
    entries = [(case.kernel, case.key) for case in tune.collect(MODULES)]
    assert tuple(entries[: len(tune.MOST_VALUABLE)]) == tune.MOST_VALUABLE
    assert len(set(entries)) == len(entries) > len(tune.MOST_VALUABLE)


def test_candidates_are_compiled_before_their_case_is_measured(device: torch.device) -> None:
    events: list[str] = []
    cases = [small_case(device, []), small_case(device, [])]

    def clock(run: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            events.append("measured")
            return 1.0

        return once

    tune.tune(cases, device, clock, rounds=1, say=lambda line: None, before=lambda case: events.append("compiled"))
    assert events == ["compiled", "measured"] * 2


def test_every_case_has_a_default_with_the_same_names() -> None:
    default = default_tiles()
    cases = tune.collect(MODULES)
    entries = [(case.kernel, case.key) for case in cases]
    assert ("score_map", "map") in entries
    assert len(set(entries)) == len(entries)
    for case in cases:
        assert all(set(sizes) == set(default[case.kernel][case.key]) for sizes in case.candidates)


def test_the_command_without_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        tune.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in (*MODULES, "use_tiles", "--seconds"))


def test_a_file_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(TilesError, match="--out"):
        require_writable(tmp_path / "absent" / "gpu.json")
