"""`fastbgad reproduce`: what is planned, the dry run, and a run with whatever is missing or fails named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fastbgad.__main__ import main
from fastbgad.cli.parser import parse
from fastbgad.cli.reproduce import Reproduce, plans_of
from fastbgad.errors import ConfigError, FeatureError, Notice
from fastbgad.experiments.plan.cells import Cell, CellResult
from fastbgad.experiments.plan.plan import cells_of
from fastbgad.experiments.plan.protocol import names, table_names
from fastbgad.experiments.plan.setup import Setup
from fastbgad.experiments.running.ledger import Ledger
from fastbgad.system.ranks import Rank
from tests import ROOT
from tests.cells import FakeRunner, result_of
from tests.miniature import make_miniature

PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")
FEW = ["--num-anomalies", "2", "--seeds", "2"]


def command(*arguments: str) -> Reproduce:
    parsed = parse(["reproduce", "--data", "d", "--out", "o", *arguments])
    assert isinstance(parsed, Reproduce)
    return parsed


def cells(*arguments: str) -> tuple[Cell, ...]:
    parsed = command(*arguments)
    return cells_of(plans_of(parsed, parsed.setup()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_miniature(root, size=16, normals=2, test_normals=1)
    return root


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> list[FakeRunner]:
    """The runners made, in place of those that train."""
    return use_runners(monkeypatch, None)


def use_runners(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[Sequence[Cell]], list[CellResult]] | None
) -> list[FakeRunner]:
    made: list[FakeRunner] = []

    def make(category, dataset, on_progress) -> FakeRunner:
        made.append(FakeRunner(category.name, run))
        return made[-1]

    monkeypatch.setattr("fastbgad.cli.reproduce.runner_maker", lambda *_: make)
    return made


# ----------------------------------------------------------------- options


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["reproduce", "--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "torchrun --nproc-per-node 8 -m fastbgad reproduce" in printed
    assert "srun fastbgad reproduce" in printed
    listed = printed.partition("Tables:")[2].partition("(default")[0]
    for name in names():
        assert f" {name}" in listed


def test_data_and_out_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--data", "d"], ["--out", "o"]):
        with pytest.raises(SystemExit):
            parse(["reproduce", *arguments])


def test_the_setup_comes_from_options_and_preset() -> None:
    assert command().setup() == Setup()
    demo = command(
        "--preset", "demo", "--backbone", "gabor", "--matmul-precision", "bfloat16", "--loss.beta", "0.05"
    ).setup()
    assert (demo.backbone, demo.matmul_precision, demo.training.loss.beta) == ("gabor", "bfloat16", 0.05)
    assert demo.training.flow.coupling_layers == 4
    assert demo.training.anomalies.cell_labels == "any"
    for wrong in (["--anomalies.num-anomalies", "5"], ["--anomalies.per-type"]):
        with pytest.raises(ConfigError, match="--num-anomalies"):
            command(*wrong).setup()


def test_the_digest_does_not_follow_the_default_number_of_known_anomalies() -> None:
    """Each cell has a number of its own; ledgers of earlier versions, whose default was 10, go on."""
    usual, ten = command().setup(), command("--anomalies.num-anomalies", "10").setup()
    assert usual.digest == ten.digest
    assert usual.as_dict()["training"]["anomalies"]["num_anomalies"] == 10


def test_the_former_name_of_the_matmul_precision() -> None:
    for arguments in (["--precision", "float32"], ["--precision=float32"]):
        with pytest.warns(Notice, match="--precision is deprecated; it is now called --matmul-precision"):
            assert command(*arguments).matmul_precision == "float32"


def test_files_name_the_matmul_precision_as_before() -> None:
    """Runs of earlier versions, whose default was called float16, go on."""
    assert Setup().as_dict()["precision"] == "float16"
    assert list(Setup().as_dict())[-1] == "precision"
    assert Setup().digest == Setup(matmul_precision="float16").digest
    assert Setup(matmul_precision="bfloat16").as_dict()["precision"] == "bfloat16"


def test_all_tables_without_names() -> None:
    parsed = command("--preset", "demo")
    assert [plan.name for plan in plans_of(parsed, parsed.setup())] == list(table_names())


def test_one_number_of_seeds_is_how_many() -> None:
    assert {cell.seed for cell in cells("btad")} == {0, 1, 2, 3, 4}
    assert {cell.seed for cell in cells("btad", "--seeds", "2")} == {0, 1}
    assert {cell.seed for cell in cells("btad", "--seeds", "7", "3")} == {3, 7}
    with pytest.raises(ConfigError, match="--seeds is 0"):
        cells("btad", "--seeds", "0")


def test_choices_leave_out_the_tables_that_lack_them() -> None:
    parsed = command("--categories", "carpet", "02", "--methods", "nfad")
    plans = plans_of(parsed, parsed.setup())
    # supervised_vs_bgad has no NFAD
    assert {plan.name for plan in plans} == set(table_names()) - {"supervised_vs_bgad"}
    assert {(cell.dataset, cell.category) for cell in cells_of(plans)} == {("mvtec", "carpet"), ("btad", "02")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one_clas"], "did you mean one_class"),
        (["btad", "--categories", "carpet"], "carpet"),
        (["--categories", "carpte"], "did you mean carpet"),
        (["--methods", "bgda"], "did you mean bgad"),
        (["one_class", "--categories", "bottle"], "none of the categories"),
        (["supervised_vs_bgad", "--methods", "nfad"], "none of the methods"),
        (["unsupervised_vs_bgad", "--methods", "padim"], "--peers"),
    ],
)
def test_a_wrong_choice_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells(*arguments)


# ----------------------------------------------------------------- dry run


def reproduce(data: Path, out: Path, *arguments: str) -> int:
    return main(["reproduce", *arguments, "--data", str(data), "--out", str(out), *FEW])


def test_dry_run_counts_and_makes_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(data, tmp_path / "run", "btad", "one_class", "--dry-run") == 0
    printed = capsys.readouterr().out
    # one_class: 5 + 4 types, BGAD trains once for each, NFAD once for all, with 2 seeds
    assert row_of(printed, "btad") == ["12", "0", "12", "0"]
    assert row_of(printed, "one_class") == ["36", "0", "36", "0"]
    assert row_of(printed, "all, each cell once") == ["48", "0", "48", "0"]
    assert "48 cells to run by 34 trainings; how long they take is not known before one is done" in printed
    assert not (tmp_path / "run").exists()


def row_of(printed: str, name: str) -> list[str]:
    line = next(line for line in printed.splitlines() if line.startswith(f"│ {name} "))
    return [part.strip() for part in line.split("│")[2:-1]]


def test_dry_run_estimates_from_what_is_done(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = cells("btad", *FEW)
    ledger = Ledger(tmp_path, Setup())
    for cell in wanted[:3]:
        ledger.write(result_of(cell))  # of 2 seconds each
    assert reproduce(data, tmp_path, "btad", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert row_of(printed, "btad") == ["12", "3", "9", "0"]
    assert "about 18 s with one process" in printed
    assert len(list(ledger.cells.iterdir())) == 3


def test_dry_run_names_what_is_missing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data / "btad", tmp_path / "data" / "btad")
    shutil.copytree(data / "mvtec" / "metal_nut", tmp_path / "data" / "metal_nut")
    shutil.rmtree(tmp_path / "data" / "btad" / "02")
    for part in ("test", "ground_truth"):
        shutil.rmtree(tmp_path / "data" / "metal_nut" / part / "flip")
        next((tmp_path / "data" / "metal_nut" / part / "bent").iterdir()).unlink()
    assert reproduce(tmp_path / "data", tmp_path / "run", "btad", "one_class", "--dry-run") == 2
    printed = capsys.readouterr().out
    assert row_of(printed, "btad") == ["12", "0", "8", "4"]
    assert "4 cells cannot be run: the category 02 of BTAD was not found in" in printed
    assert "cells cannot be run: the category carpet of MVTec AD was not found in" in printed
    assert "has no anomaly type 'flip'" in printed
    # a known type with one image, where two are to be known
    assert "4 cells cannot be run: num_anomalies is 2 in total but" in printed
    assert "(bent 1)" in printed


def test_dry_run_refuses_the_folder_of_another_setup(data: Path, tmp_path: Path, capsys) -> None:
    Ledger(tmp_path, Setup(pro_limit=0.5))
    assert reproduce(data, tmp_path, "btad", "--dry-run") == 2
    assert "pro_limit is 0.5 there and 0.3 here" in capsys.readouterr().err


# --------------------------------------------------------------------- run


def test_a_run_and_its_resumption(data: Path, tmp_path: Path, runners: list[FakeRunner], capsys) -> None:
    assert reproduce(data, tmp_path, "btad") == 0
    printed = capsys.readouterr().out
    assert "12 cells, 0 done" in printed
    assert "BTAD, multi-class setting" in printed
    assert [runner.name for runner in runners] == ["01", "02", "03"]
    for name in ("reproduce.html", "tables/btad.csv", "tables/btad.tex", "setup.json", "manifest.json"):
        assert (tmp_path / name).is_file(), name
    (launch,) = json.loads((tmp_path / "manifest.json").read_text())["launches"]
    (protocol,) = launch["protocols"]
    assert (protocol["name"], protocol["seeds"], protocol["num_anomalies"]) == ("btad", [0, 1], [2])
    assert protocol["cells"] == protocol["trainings"] == 12
    assert "BTAD" in protocol["protocol"]
    assert launch["versions"]["torch"]
    assert launch["options"]["names"] == ["btad"]
    # another table that shares nothing, and then nothing at all
    assert reproduce(data, tmp_path, "btad", "beta", "--categories", "01", "grid") == 0
    assert [runner.name for runner in runners] == ["01", "02", "03", "grid"]
    assert reproduce(data, tmp_path, "btad", "--categories", "01") == 0
    assert len(runners) == 4
    assert len(json.loads((tmp_path / "manifest.json").read_text())["launches"]) == 3


def test_what_fails_or_is_missing_is_listed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(asked: Sequence[Cell]) -> list[CellResult]:
        if asked[0].category == "03" and asked[0].method == "bgad":
            raise FeatureError("training diverged\nlower the learning rate")
        return list(map(result_of, asked))

    use_runners(monkeypatch, run)
    folders = [tmp_path / "data" / name for name in ("01", "03")]
    for folder in folders:
        shutil.copytree(data / "btad" / folder.name, folder)
    assert reproduce(tmp_path / "data", tmp_path / "run", "btad") == 2
    printed = capsys.readouterr().out
    assert "6 of 12 cells have no result" in printed
    assert "2 cells (btad 03 · BGAD, seed 0; btad 03 · BGAD, seed 1): training diverged\n    lower" in printed
    assert "4 cells (btad 02 · NFAD, seed 0;" in printed
    assert "the category 02 of BTAD was not found in" in printed
    assert (tmp_path / "run" / "reproduce.html").is_file()
    use_runners(monkeypatch, None)
    assert reproduce(data, tmp_path / "run", "btad") == 0


def test_only_the_first_process_speaks(
    data: Path, tmp_path: Path, runners: list[FakeRunner], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("fastbgad.cli.reproduce.find_rank", lambda: Rank(1, 2, 1, 2, "slurm"))
    shutil.copytree(data / "btad" / "01", tmp_path / "data" / "01")
    assert reproduce(tmp_path / "data", tmp_path / "run", "btad", "--dry-run") == 0
    # It says nothing of the two categories that are missing either, and is no failure: that would stop the others.
    assert reproduce(tmp_path / "data", tmp_path / "run", "btad") == 0
    assert capsys.readouterr().out == ""
    assert [runner.name for runner in runners] == ["01"]
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_ctrl_c(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def run(asked: Sequence[Cell]) -> list[CellResult]:
        if asked[0].category == "02":
            raise KeyboardInterrupt
        return list(map(result_of, asked))

    use_runners(monkeypatch, run)
    assert reproduce(data, tmp_path, "btad") == 130
    error = capsys.readouterr().err
    assert "4 of 12 cells have results" in error
    assert str(tmp_path) in error


def test_torchrun_shares_the_cells_among_processes(tmp_path: Path) -> None:
    make_miniature(tmp_path / "data")
    tiny = ["--backbone", "gabor", "--preset", "demo", "--image-size", "64", "64", "--flow.coupling-layers", "1"]
    once = ["--schedule.meta-epochs", "1", "--schedule.sub-epochs", "1", "--anomalies.cut-paste", "0"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "fastbgad", "reproduce", "btad", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")),
            *(*tiny, *once, *FEW),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name not in PLACES},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("page:") == 1
    assert "first of 2 processes" in done.stdout
    assert len(list((tmp_path / "run" / "cells").iterdir())) == 12
    assert list((tmp_path / "run" / "claims").iterdir()) == []


def test_the_slurm_example_passes_its_arguments_on(tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    script = ROOT / "examples" / "reproduce.sbatch"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "8"}

    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(script), *arguments], capture_output=True, text=True, check=False, env=environment
        )

    printed = submit("my data", "out", "btad", "--seeds", "2").stdout.splitlines()
    started = printed.index("python")
    assert "--cpus-per-task=8" in printed[:started]
    assert printed[started + 1 : started + 3] == ["-m", "fastbgad"]
    parsed = parse(printed[started + 3 :])
    assert isinstance(parsed, Reproduce)
    assert (parsed.names, parsed.data, parsed.out, parsed.seeds) == (("btad",), (Path("my data"),), Path("out"), (2,))
    assert submit("data").returncode == 2
