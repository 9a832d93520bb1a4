"""Compile every kernel ahead of time, without a GPU, and check the resources it needs against a stored budget.

    python -m fastbgad.kernels.resources                                   # the table; exit code 1 if a rule is broken
    python -m fastbgad.kernels.resources --arch 90 --only flow_forward     # while working on one kernel
    python -m fastbgad.kernels.resources --update-budget                   # accept what the kernels need now

Rules for each variant and architecture: it compiles; it uses no local memory (spilled registers) in innermost loops;
shared and tensor memory are within the chip's limit; registers, stack and shared memory are within the budget; the
matrix unit is that of the budget. The budget is `budget.json` in the folder of the kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..tile_sizes import TilesError, use_tiles, write_json
from ..triton_version import triton_version, why_not_this_triton
from .budget import BUDGET, broken_rules, over_budget, read_budget, updated_budget
from .compilation import ResourcesError, find_tool
from .table import collect, compile_all, markdown_table, text_table

ARCHITECTURES = (80, 90, 100)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 all rules hold, 1 a rule is broken, 2 the gate cannot run."""
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
