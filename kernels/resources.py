"""Compiles every kernel ahead of time, without a GPU, and checks what each needs of the chip against a stored budget.

    python -m fastbgad.kernels.resources                                   # the table; exit code 1 if a rule is broken
    python -m fastbgad.kernels.resources --arch 90 --only flow_forward     # while working on one kernel
    python -m fastbgad.kernels.resources --update-budget                   # accept what the kernels need now

Rules, for each variant and architecture: it compiles; no local memory (spilled registers) in innermost loops; shared
and tensor memory within the chip's limit; registers, stack and shared memory within the budget; the budget's matrix
unit. The budget is `budget.json` beside this file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .failure import reason
from .tile_sizes import TilesError, use_tiles, write_json
from .triton_version import triton_version, why_not_this_triton
from .variants import MODULES, Variant

ARCHITECTURES = (80, 90, 100)
BUDGET = Path(__file__).parent / "budget.json"
UPDATE = "python -m fastbgad.kernels.resources --update-budget"

# Shared memory that one program may use, in bytes, by compute capability (CUDA programming guide, "opt-in" maximum).
# 8.0 itself has 166,912; what compiles for it also runs on 8.6 and 8.9, which have less.
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
TENSOR_COLUMNS = 512  # tensor memory of an sm_100 multiprocessor
# What a matrix product compiles to, best first.
MATRIX_UNITS = ("UTCHMMA", "UTCQMMA", "HGMMA", "HMMA")
LOCAL_MEMORY = ("LDL", "STL")  # load and store


class Resources(NamedTuple):
    """What one compiled kernel needs."""

    registers: int  # per thread
    stack_bytes: int  # per thread; more than a few mean that registers spill
    shared_bytes: int  # per program
    local_in_loops: int  # loads and stores of local memory inside innermost loops
    matrix_unit: str  # the matrix instruction used, "" for none
    tensor_columns: int  # columns of tensor memory (sm_100)


class Row(NamedTuple):
    """One line of the table."""

    variant: str
    arch: int
    resources: Resources | None  # None where it does not compile
    problem: str  # why it does not
    seconds: float


class ResourcesError(RuntimeError):
    """The gate cannot run here; the message says what is missing."""


def compile_variant(variant: Variant, arch: int) -> Resources:
    """Compiles a variant for compute capability `arch` (80, 90, 100) and reads its resources off the machine code."""
    # Triton is imported where it is used: without it, or with an old one, `_run` says what to do.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in arguments}
    constants = {(arguments.index(name),): value for name, value in variant.constants.items()}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(arguments):
        kind = signature[name]
        parts = [((i, j), part) for j, part in enumerate(kind)] if isinstance(kind, tuple) else [((i,), kind)]
        for place, part in parts:
            if part.startswith("*") or name in variant.multiples_of_16:
                aligned[place] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    usage, assembly = _disassemble(compiled.asm["cubin"])
    per_thread = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    return Resources(
        registers=int(per_thread["REG"]),
        stack_bytes=int(per_thread["STACK"]),
        shared_bytes=compiled.metadata.shared,
        local_in_loops=count_local_in_loops(assembly),
        matrix_unit=next((unit for unit in MATRIX_UNITS if re.search(rf"\b{unit}\b", assembly)), ""),
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
    )


def find_tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm, which ship with Triton."""
    import triton

    try:
        return str(getattr(triton.knobs.nvidia, name).path)
    except RuntimeError as error:
        raise ResourcesError(f"{name} was not found; it ships with the package triton: reinstall that") from error


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """cuobjdump's resource usage and the machine code as nvdisasm prints it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        commands = ("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "--print-code")
        usage, assembly = (
            subprocess.run([find_tool(tool), option, str(path)], check=True, capture_output=True, text=True).stdout
            for tool, option in commands
        )
    return usage, assembly


# --- spills in loops -------------------------------------------------------------------------------------------------

_LABEL = re.compile(r"(\.L_x_\d+|\.text\.\S+|[\w$]+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")


def count_local_in_loops(assembly: str) -> int:
    """Loads and stores of local memory (LDL, STL) in innermost loops of what `nvdisasm --print-code` prints.

    A spill around an innermost loop costs once per layer, one inside it once per product. Loops are cycles of the
    control flow, not stretches of text: sm_100 code waits in spin loops that lie behind the end of the kernel and jump
    back. A spin loop is not counted as a loop, or the loop that waits would no longer be an innermost one.
    """
    code, successors = _control_flow(assembly)
    innermost = set().union(*_innermost_loops(code, set(range(len(code))), successors))
    return sum(op.split(".")[0] in LOCAL_MEMORY for block in innermost for op in code[block])


def _control_flow(assembly: str) -> tuple[list[list[str]], list[set[int]]]:
    """The operations of every block (entered at its top, left at its bottom), and the blocks that may follow it."""
    blocks: list[list[str]] = [[]]
    label_at: dict[str, int] = {}
    jumps: list[tuple[int, str | None]] = []  # from block to label; None: to any
    falls: list[int] = []  # blocks that run into the next one
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1]:
                falls.append(len(blocks) - 1)
                blocks.append([])
            label_at[label[1]] = len(blocks) - 1
        elif instruction := _INSTRUCTION.match(line):
            predicate, operation, operands = instruction.groups()
            kind = operation.split(".")[0]
            target = re.search(r"^(.*)`\((\.L_x_\d+)\)", operands)
            blocks[-1].append(operation)
            # sm_80 leaves some loops by a CALL of a label in the same kernel; a call of a function comes back.
            if kind in ("BRA", "BRX", "JMP", "JMX") or (kind == "CALL" and target):
                jumps.append((len(blocks) - 1, target[2] if target else None))
                conditional = bool(predicate) or bool(target and target[1].strip())
            elif kind in ("EXIT", "RET", "KILL"):
                conditional = bool(predicate)
            else:
                continue
            if conditional:
                falls.append(len(blocks) - 1)
            blocks.append([])
    successors: list[set[int]] = [set() for _ in blocks]
    for start in falls:
        if start + 1 < len(blocks):
            successors[start].add(start + 1)
    for start, name in jumps:
        successors[start].update(label_at.values() if name is None else {label_at[name]})
    return blocks, successors


def _innermost_loops(code: Sequence[list[str]], blocks: set[int], successors: Sequence[set[int]]) -> list[set[int]]:
    """The cycles among `blocks` that hold no other cycle but spin loops."""
    found = []
    for loop in _cycles(blocks, successors):
        if _is_spin(code, loop):
            continue
        # Without the ways back to its entries, what is still a cycle is a loop inside this one.
        entries = {to for start in blocks - loop for to in successors[start]} & loop or {min(loop)}
        inside = [to & loop - entries for to in successors]
        found += _innermost_loops(code, loop, inside) or [loop]
    return found


def _cycles(blocks: set[int], successors: Sequence[set[int]]) -> list[set[int]]:
    """The strongly connected components of more than one block, or of one that jumps to itself."""
    predecessors: list[set[int]] = [set() for _ in successors]
    for start in blocks:
        for to in successors[start]:
            predecessors[to].add(start)
    found, left = [], set(blocks)
    while left:
        block = min(left)
        component = (_reach(block, successors, left) & _reach(block, predecessors, left)) | {block}
        left -= component
        if len(component) > 1 or block in successors[block]:
            found.append(component)
    return found


def _reach(start: int, successors: Sequence[set[int]], among: set[int]) -> set[int]:
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        new = (successors[waiting.pop()] & among) - seen
        seen |= new
        waiting += new
    return seen


def _is_spin(code: Sequence[list[str]], loop: set[int]) -> bool:
    """Whether a loop does nothing but wait for a barrier or an allocation."""
    operations = [op for block in loop for op in code[block]]
    waits = any("TRYWAIT" in op or op.startswith("NANOSLEEP") for op in operations)
    works = any(op.split(".")[0] in (*MATRIX_UNITS, *LOCAL_MEMORY) for op in operations)
    return waits and not works and len(operations) <= 16


# --- the table and its rules -----------------------------------------------------------------------------------------


def collect(only: str = "") -> tuple[list[tuple[str, int, Variant]], list[str]]:
    """(module, place in its `variants()`, variant) of every kernel whose name holds `only`; and what is wrong."""
    found, broken = [], []
    for name in MODULES:
        try:
            variants = importlib.import_module(f"{__package__}.variants.{name}").variants()
        except (ImportError, AttributeError, TilesError) as error:
            if only in name:
                broken.append(f"{name}: this kernel module cannot list its variants ({error})")
            continue
        found += [(name, i, variant) for i, variant in enumerate(variants) if only in variant.name]
    names = [variant.name for _, _, variant in found]
    broken += [f"{name}: two variants have this name" for name in sorted(set(names)) if names.count(name) > 1]
    return found, broken


def compile_all(
    jobs: Sequence[tuple[str, int, Variant]], architectures: Sequence[int], tiles_file: Path | None = None
) -> list[Row]:
    """Compiles every variant for every architecture, over all cores."""
    tasks = [(module, i, variant.name, arch) for module, i, variant in jobs for arch in architectures]
    workers = max(1, min(len(tasks), len(os.sched_getaffinity(0))))
    # Spawned, not forked: the compiler has threads of its own.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), use_tiles, (tiles_file,)) as pool:
        return list(pool.map(_compile_one, tasks))


def _compile_one(task: tuple[str, int, str, int]) -> Row:
    module, place, name, arch = task
    start = time.perf_counter()
    try:
        resources = compile_variant(importlib.import_module(f"{__package__}.variants.{module}").variants()[place], arch)
    except ResourcesError:
        raise
    except Exception as error:  # whatever stops the compiler is a finding of this one variant
        return Row(name, arch, None, reason(error), time.perf_counter() - start)
    return Row(name, arch, resources, "", time.perf_counter() - start)


def broken_rules(rows: Sequence[Row]) -> list[str]:
    """What no budget can allow: one line per broken rule."""
    broken = []
    for name, arch, needs, problem, _ in rows:
        where = f"{name} on sm_{arch}"
        if needs is None:
            broken.append(f"{where}: does not compile ({problem})")
            continue
        if needs.local_in_loops:
            broken.append(f"{where}: {needs.local_in_loops} loads and stores of local memory in innermost loops")
        if needs.shared_bytes > SHARED_LIMIT[arch]:
            broken.append(f"{where}: {needs.shared_bytes} bytes of shared memory, the chip has {SHARED_LIMIT[arch]}")
        if needs.tensor_columns > TENSOR_COLUMNS:
            broken.append(f"{where}: {needs.tensor_columns} columns of tensor memory, the chip has {TENSOR_COLUMNS}")
    return broken


def over_budget(rows: Sequence[Row], budget: Mapping[str, Mapping[str, Any]], complete: bool) -> list[str]:
    """Where the rows leave the budget, one line each; `complete` also reports budget entries without a variant."""
    broken = []
    for name, arch, needs, _, _ in rows:
        if needs is None:
            continue
        stored = budget.get(name, {}).get(str(arch))
        if stored is None:
            broken.append(f"{name} on sm_{arch}: not in the budget; if its table is as it should be: {UPDATE}")
            continue
        for key, value in _budget_entry(needs).items():
            if value != stored.get(key) if key == "matrix_unit" else value > stored.get(key, -1):
                broken.append(
                    f"{name} on sm_{arch}: {key} is {value or 'none'}, the budget says {stored.get(key) or 'none'}"
                )
    if complete:
        names = {row.variant for row in rows}
        broken += [f"{name}: in the budget but no kernel has it; {UPDATE}" for name in sorted(set(budget) - names)]
    return broken


def _budget_entry(needs: Resources) -> dict[str, Any]:
    return {key: getattr(needs, key) for key in ("registers", "stack_bytes", "shared_bytes", "matrix_unit")}


def read_budget(path: Path) -> dict[str, Any]:
    """The stored budget: {"triton": version, "variants": {variant: {arch: entry}}}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content["variants"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ResourcesError(f"{path} is not a readable budget ({error!r}); write it with: {UPDATE}") from error
    return content


def updated_budget(budget: Mapping[str, Any], rows: Sequence[Row], complete: bool) -> dict[str, Any]:
    """The budget with the rows' needs in it; what was not compiled stays, or goes if `complete`."""
    variants = {} if complete else {name: dict(entry) for name, entry in budget["variants"].items()}
    for row in rows:
        if row.resources is not None:
            variants.setdefault(row.variant, {})[str(row.arch)] = _budget_entry(row.resources)
    return {"triton": triton_version(), "variants": variants}


_HEADINGS = ("kernel", "arch", "registers", "stack", "shared", "local in loops", "matrix unit", "seconds")


def _cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for name, arch, needs, _, seconds in rows:
        if needs is None:
            yield (name, f"sm_{arch}", *["-"] * 5, f"{seconds:.1f}")
        else:
            sizes = (needs.registers, needs.stack_bytes, needs.shared_bytes, needs.local_in_loops)
            yield (name, f"sm_{arch}", *map(str, sizes), needs.matrix_unit or "-", f"{seconds:.1f}")


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal: registers per thread, bytes of stack per thread, bytes of shared memory per program."""
    cells = [_HEADINGS, *_cells(rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pad = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    return "\n".join("  ".join(f(text, n) for f, text, n in zip(pad, row, widths, strict=True)) for row in cells)


def markdown_table(rows: Sequence[Row]) -> str:
    """The table without its last column, the seconds, in Markdown."""
    cells = [_HEADINGS[:-1], ["---", "---", *["---:"] * (len(_HEADINGS) - 3)], *(row[:-1] for row in _cells(rows))]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 all rules hold, 1 a rule is broken, 2 the gate cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m fastbgad.kernels.resources", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", metavar="TEXT", help="only variants whose name contains this")
    parser.add_argument("--budget", type=Path, default=BUDGET, metavar="FILE", help="another budget file")
    parser.add_argument("--update-budget", action="store_true", help="store what the kernels need now as the budget")
    parser.add_argument("--tiles", type=Path, metavar="FILE", help="tile sizes of one GPU; no budget is applied then")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (ResourcesError, TilesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if obstacle := why_not_this_triton(triton_version()):
        raise ResourcesError(obstacle)
    import triton

    if triton.knobs.runtime.interpret:
        raise ResourcesError("TRITON_INTERPRET is set, so kernels are interpreted, not compiled; unset it")
    for tool in ("cuobjdump", "nvdisasm"):
        find_tool(tool)
    use_tiles(options.tiles)
    jobs, broken = collect(options.only)
    if not jobs and not broken:
        raise ResourcesError(f"no variant's name contains {options.only!r}")
    rows = compile_all(jobs, options.arch, options.tiles)
    print(markdown_table(rows) if options.markdown else text_table(rows))
    if options.json:
        table = [{**row._asdict(), "resources": row.resources and row.resources._asdict()} for row in rows]
        write_json(options.json, {"triton": triton.__version__, "rows": table})

    complete = not options.only and set(options.arch) == set(ARCHITECTURES) and not broken
    broken += broken_rules(rows)
    if options.update_budget:
        known = read_budget(options.budget) if options.budget.exists() else {"variants": {}}
        write_json(options.budget, updated_budget(known, rows, complete))
    elif options.tiles is None:
        budget = read_budget(options.budget)
        over = over_budget(rows, budget["variants"], complete)
        if over and budget.get("triton") != triton.__version__:
            over.append(f"the budget was made with triton {budget.get('triton')}, this is triton {triton.__version__}")
        broken += over
    for line in broken:
        print(f"broken: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
