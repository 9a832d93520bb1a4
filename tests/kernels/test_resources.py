"""The ahead-of-time gate: every shipped kernel compiles and stays within its budget, and the gate itself can fail."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from fastbgad.kernels import resources
from fastbgad.kernels.resources import (
    BUDGET,
    SHARED_LIMIT,
    Resources,
    ResourcesError,
    Row,
    broken_rules,
    count_local_in_loops,
    markdown_table,
    over_budget,
    read_budget,
    text_table,
    updated_budget,
)
from tests import ROOT
from tests.grids import covering


def run_compiled(*command: str, names: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in another process: this one may be interpreting kernels, and the two exclude each other."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = (sys.executable, *command)
    return subprocess.run(command, capture_output=True, text=True, env=environment, input=names, check=False)


def gate(*options: str) -> subprocess.CompletedProcess[str]:
    return run_compiled("-m", "fastbgad.kernels.resources", *options)


def test_the_readme_shows_the_budget() -> None:
    """Its table for sm_90 is `--arch 90 --markdown` without the column of the architecture."""
    readme = (ROOT / "README.md").read_text()
    shown = {}
    for line in readme.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[1].isdigit():
            shown[cells[0]] = cells[1:]
    variants = read_budget(BUDGET)["variants"]
    assert set(shown) == set(variants)
    for name, (registers, stack, shared, local, unit) in shown.items():
        needs = variants[name]["90"]
        sizes = (needs["registers"], needs["stack_bytes"], needs["shared_bytes"], 0)
        assert (int(registers), int(stack), int(shared), int(local)) == sizes, name
        assert unit == (needs["matrix_unit"] or "-"), name


# Compiles the variants named on standard input. The gate's own processes read this file again.
SELECTED = """
import sys
from fastbgad.kernels.resources import command

if __name__ == "__main__":
    names, everything = sys.stdin.read().splitlines(), command.collect
    command.collect = lambda only: ([job for job in everything()[0] if job[2].name in names], everything()[1])
    sys.exit(command.main(["--only", "these", *sys.argv[1:]]))
"""


def of_each_kernel(name: str) -> set[tuple[str, str]]:
    """Facets of a variant: each word of its name, on its kernel."""
    return {(name.split()[0], word) for word in name.split()}


def of_any_kernel(name: str) -> set[str]:
    """Facets of a variant: each word of its name, on whatever kernel."""
    return set(name.split())


@pytest.mark.parametrize(
    ("architectures", "facets"), [(["90"], of_each_kernel), (["80", "100"], of_any_kernel)], ids=["90", "80 and 100"]
)
def test_selected_kernels_are_within_their_budget(
    architectures: list[str], facets: Callable[[str], set], tmp_path: Path
) -> None:
    """Every kernel on every architecture, and everything that its variants differ in on one or some kernel."""
    selected = covering({name: facets(name) for name in read_budget(BUDGET)["variants"]})
    script, table = tmp_path / "selected.py", tmp_path / "table.json"
    script.write_text(SELECTED)
    done = run_compiled(str(script), "--arch", *architectures, "--json", str(table), names="\n".join(selected))
    assert done.returncode == 0, done.stderr
    rows = json.loads(table.read_text())["rows"]
    assert {(row["variant"], row["arch"]) for row in rows} == set(itertools.product(selected, map(int, architectures)))


def test_too_high_a_need_is_seen(tmp_path: Path) -> None:
    """With a budget that one kernel exceeds."""
    name = next(name for name in read_budget(BUDGET)["variants"] if name.startswith("score_map"))
    budget = json.loads(BUDGET.read_text())
    registers = budget["variants"][name]["90"]["registers"]
    budget["variants"][name]["90"]["registers"] -= 1
    lowered = tmp_path / "budget.json"
    lowered.write_text(json.dumps(budget))
    done = gate("--budget", str(lowered), "--only", name, "--arch", "90")
    assert done.returncode == 1
    assert done.stderr.count("broken:") == 1
    assert f"{name} on sm_90: registers is {registers}" in done.stderr


@pytest.mark.slow
def test_every_kernel_is_within_its_budget(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    done = gate("--json", str(table))
    assert done.returncode == 0, done.stderr
    rows = json.loads(table.read_text())["rows"]
    assert {row["arch"] for row in rows} == set(SHARED_LIMIT)
    assert {row["variant"] for row in rows} == set(read_budget(BUDGET)["variants"])
    assert all(row["variant"] in done.stdout for row in rows)


SPILLING = """
import triton
import triton.language as tl
from fastbgad.kernels.resources import compile_variant
from fastbgad.kernels.variants import Variant


@triton.jit
def kernel(data, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x = tl.load(data + place)
    y = tl.load(data + BLOCK + place)
    for i in range(count):
        x = x * tl.load(data + i * BLOCK + place) + y
        y = tl.exp(y) * x
    tl.store(data + place, x + y)


for arch in (80, 90, 100):
    for block in (128, 4096):
        variant = Variant("spilling", kernel, {"data": "*fp32", "count": "i32"}, {"BLOCK": block}, num_warps=1)
        print(arch, block, compile_variant(variant, arch).local_in_loops)
"""


def test_a_spill_in_a_loop_is_seen_on_every_architecture(tmp_path: Path) -> None:
    """256 values a thread do not fit in 255 registers; 8 do. Guards the reading of the disassembly."""
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)
    done = run_compiled(str(script))
    assert done.returncode == 0, done.stderr
    found = {tuple(line.split()[:2]): int(line.split()[2]) for line in done.stdout.splitlines()}
    assert all(found[arch, "128"] == 0 for arch in ("80", "90", "100"))
    assert all(found[arch, "4096"] > 0 for arch in ("80", "90", "100"))


def assembly(text: str) -> str:
    """A kernel as nvdisasm prints it: labels on lines of their own, addresses, and a loop that is never entered."""
    lines = re.split(r"\s*;\s*|(?<=:)\s+", f"{text}; EXIT; .L_x_99: BRA `(.L_x_99)")
    numbered = [line if line.endswith(":") else f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines)]
    return "\n".join(["\t.section\t.text.kernel", "kernel:", ".text.kernel:", *numbered])


TRYWAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5"
CODE = {
    "no loop": ("STL [R1], R2; LDL R2, [R1]", 0),
    "loop": (".L_x_0: STL [R1], R2; LDL.LU R3, [R1]; @!P0 BRA `(.L_x_0)", 2),
    "around a loop": ("STL [R1], R2; .L_x_0: FADD R1, R1, R2; @P0 BRA `(.L_x_0); LDL R2, [R1]", 0),
    "uniform predicate": (".L_x_0: STL.64 [R1], R2; BRA.U UP0, `(.L_x_0)", 1),
    "outer": (".L_x_0: STL [R1], R2; .L_x_1: HMMA R1, R2, R3; @P1 BRA `(.L_x_1); @P0 BRA `(.L_x_0)", 0),
    "inner": (".L_x_0: FADD R1, R1, R2; .L_x_1: LDL R1, [R1]; @P1 BRA `(.L_x_1); @P0 BRA `(.L_x_0)", 1),
    "two ways back to one loop": (".L_x_0: @P1 BRA `(.L_x_0); STL [R1], R2; @P0 BRA `(.L_x_0)", 1),
    "left by a call, as on sm_80": (
        ".L_x_0: STL [R1], R2; @P0 CALL.REL.NOINC `(.L_x_1); BRA `(.L_x_0); .L_x_1: LDL R2, [R1]",
        1,
    ),
    "a function that comes back": (
        ".L_x_0: CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64); STL [R1], R2; @P0 BRA `(.L_x_0)",
        1,
    ),
    "waits behind the end, as on sm_100": (
        f".L_x_0: {TRYWAIT}; @!P1 BRA `(.L_x_2); .L_x_1: STL [R1], R2; @P0 BRA `(.L_x_0); LDL R2, [R1]; EXIT;"
        f".L_x_2: {TRYWAIT}; @!P1 BRA `(.L_x_2); BRA `(.L_x_1)",
        1,
    ),
    "waits within": (".L_x_0: STL [R1], R2; .L_x_1: NANOSLEEP 0x64; @!P1 BRA `(.L_x_1); @P0 BRA `(.L_x_0)", 1),
}


@pytest.mark.parametrize(("text", "expected"), CODE.values(), ids=CODE)
def test_local_memory_in_loops(text: str, expected: int) -> None:
    assert count_local_in_loops(assembly(text)) == expected


GOOD = Resources(128, 0, 1024, 0, "HGMMA", 0)
ENTRY = {"registers": 128, "stack_bytes": 0, "shared_bytes": 1024, "matrix_unit": "HGMMA"}


def rows(needs: Resources | None, problem: str = "") -> list[Row]:
    return [Row("kernel", 90, needs, problem, 1.0)]


def test_rules_without_a_budget() -> None:
    assert broken_rules(rows(GOOD)) == []
    for needs, message in (
        (GOOD._replace(local_in_loops=3), "3 loads and stores of local memory"),
        (GOOD._replace(shared_bytes=SHARED_LIMIT[90] + 1), "the chip has 232448"),
        (GOOD._replace(tensor_columns=513), "tensor memory"),
    ):
        (line,) = broken_rules(rows(needs))
        assert message in line
        assert "kernel on sm_90" in line
    assert "does not compile (PTXASError)" in broken_rules(rows(None, "PTXASError"))[0]


def test_the_budget() -> None:
    budget = {"kernel": {"90": ENTRY}}
    assert over_budget(rows(GOOD), budget, complete=True) == []
    less = GOOD._replace(registers=100, shared_bytes=0)
    assert over_budget(rows(less), budget, complete=True) == []
    for needs, message in (
        (GOOD._replace(registers=129), "registers is 129, the budget says 128"),
        (GOOD._replace(stack_bytes=8), "stack_bytes is 8, the budget says none"),
        (GOOD._replace(shared_bytes=1025), "shared_bytes is 1025, the budget says 1024"),
        (GOOD._replace(matrix_unit="HMMA"), "matrix_unit is HMMA, the budget says HGMMA"),
        (GOOD._replace(matrix_unit=""), "matrix_unit is none, the budget says HGMMA"),
    ):
        (line,) = over_budget(rows(needs), budget, complete=True)
        assert message in line
    (line,) = over_budget(rows(GOOD), {"kernel": {"80": ENTRY}}, complete=True)
    assert "not in the budget" in line
    assert "--update-budget" in line
    former = {**budget, "former": {"90": ENTRY}}
    (line,) = over_budget(rows(GOOD), former, complete=True)
    assert line.startswith("former: in the budget but no kernel has it")
    assert "--update-budget" in line
    assert over_budget(rows(GOOD), former, complete=False) == []


def test_updating_the_budget() -> None:
    before = {"triton": "0", "variants": {"kernel": {"80": ENTRY}, "former": {"90": ENTRY}}}
    after = updated_budget(before, rows(GOOD), complete=False)
    assert after["variants"] == {"kernel": {"80": ENTRY, "90": ENTRY}, "former": {"90": ENTRY}}
    assert after["triton"] == triton.__version__
    assert updated_budget(before, rows(GOOD), complete=True)["variants"] == {"kernel": {"90": ENTRY}}
    assert before["variants"]["kernel"] == {"80": ENTRY}


def test_an_unreadable_budget_is_named(tmp_path: Path) -> None:
    for content in ("{", "[]", "{}", '{"variants": 3}'):
        path = tmp_path / "budget.json"
        path.write_text(content)
        with pytest.raises(ResourcesError, match=r"budget\.json is not a readable budget.*--update-budget"):
            read_budget(path)


def test_tables() -> None:
    table = [*rows(GOOD), *rows(None, "PTXASError")]
    assert text_table(table).splitlines()[1].split() == ["kernel", "sm_90", "128", "0", "1024", "0", "HGMMA", "1.0"]
    assert markdown_table(table).splitlines()[2:] == [
        "| kernel | sm_90 | 128 | 0 | 1024 | 0 | HGMMA |",
        "| kernel | sm_90 | - | - | - | - | - |",
    ]


def test_refuses_to_run_in_the_interpreter(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resources.main([]) == 2
    error = capsys.readouterr().err
    assert "TRITON_INTERPRET" in error
    assert error.count("\n") == 1


def test_a_missing_tool_is_named(monkeypatch, capsys) -> None:
    class Nowhere:
        @property
        def cuobjdump(self) -> object:
            raise RuntimeError("Cannot find cuobjdump")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton.knobs, "nvidia", Nowhere())
    assert resources.main([]) == 2
    assert "cuobjdump was not found" in capsys.readouterr().err


def test_a_missing_kernel_module_and_an_unknown_name(monkeypatch, capsys) -> None:
    monkeypatch.setattr("fastbgad.kernels.resources.table.MODULES", ("score_map", "no_such_kernel"))
    jobs, broken = resources.collect()
    assert {module for module, _, _ in jobs} == {"score_map"}
    assert len(broken) == 1
    assert "no_such_kernel" in broken[0]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resources.main(["--only", "nothing has this name"]) == 2
    assert "nothing has this name" in capsys.readouterr().err
