"""Turn a run's output folder into the files that are committed.

    python3 -m benchmarks.gpu.collect OUT

writes benchmarks/results/<gpu>/<date>-<commit>.json and, where tile sizes were tuned, kernels/configs/<gpu>.json. It
needs no GPU. Runs that followed each other into one folder count as one: the newest result of an item is taken.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbgad.kernels.tile_sizes import CONFIGS, TilesError, read_json, read_tuned, slug
from fastbgad.system.files import write_json

from .checkout import checkout
from .records import RECORDS, TROUBLES, Record, RecordError, read_records
from .stages import EQUIVALENCE, ROOT, TILES

CASES = ("headline", "tune", "compiled")
# Of a record, what the result file has besides the case itself.
_BOOKKEEPING = ("stage", "item", "at", "kernels", "outcome", "ceilings")


def collect(out: Path, here: Mapping[str, Any]) -> tuple[str, Record]:
    """Return the name of the GPU, and the content of its result file.

    Args:
        out: the run's folder.
        here: what `checkout` says of this checkout.

    Raises:
        RecordError: no whole record, nothing measured on a GPU, or records of several versions of the code.
    """
    records = read_records(out / RECORDS)
    runs = [record for record in records if record.get("stage") == "run" and record["outcome"] == "begins"]
    if not runs:
        raise RecordError(f"{out / RECORDS} holds no run; give the folder that `python3 -m benchmarks.gpu --out` wrote")
    if not all(run["measured"] for run in runs):
        raise RecordError(f"{out} holds a rehearsal, whose times mean nothing; only runs on a GPU are collected")
    sources = {run["source"] for run in runs}
    if len(sources) > 1:
        raise RecordError(f"{out} holds runs of {len(sources)} versions of the code; give each a folder of its own")
    last = runs[-1]
    commit, changed = last["commit"], last["changed_files"]
    if last["source"] == here["source"]:  # also where git was missing
        commit, changed = here["commit"], here["changed_files"]
    newest: dict[tuple[str, str], Record] = {}
    for record in records:
        if "item" in record and "step" not in record:
            newest[record["stage"], record["item"]] = record
    environment = next((found for (_, item), found in newest.items() if item == "environment"), None)
    if environment is None:
        raise RecordError(f"{out} does not say which GPU it was: the stage smoke did not come so far; run it again")
    by_stage = {stage: [r for (s, _), r in newest.items() if s == stage] for stage in {s for s, _ in newest}}
    content: Record = {
        "measured": True,
        "date": last["date"],
        "commit": commit,
        "changed_files": changed,
        "machine": environment["machine"],
        "driver": environment.get("driver"),
        "versions": environment["versions"],
        "ceilings": next((r["ceilings"] for stage in CASES for r in by_stage.get(stage, []) if "ceilings" in r), None),
        "seconds": sum(r["seconds"] for r in records if r.get("stage") == "run" and r["outcome"] == "ends"),
        "cases": [_case(record) for stage in CASES for record in by_stage.get(stage, []) if "contenders" in record],
        "equivalence": _equivalence(by_stage.get("tests", [])),
        "smoke": _counts(by_stage.get("smoke", [])),
        "whole": [_without(record) for record in by_stage.get("whole", [])],
        "troubles": [record for record in records if record.get("outcome") in TROUBLES],
    }
    return str(environment["gpu"]), content


def _case(record: Record) -> Record:
    case = {key: value for key, value in record.items() if key not in _BOOKKEEPING}
    return case | {"name": record["item"]}


def _without(record: Record) -> Record:
    return {key: value for key, value in record.items() if key not in ("stage", "at", "kernels")}


def _equivalence(records: Sequence[Record]) -> Record:
    found: Record = {}
    for operation, names in EQUIVALENCE.items():
        its = [record for record in records if any(name in record["item"] for name in names)]
        if its:
            failed = [
                f"{record['item']}: {record.get('message', record['outcome'])}"
                for record in its
                if record["outcome"] not in ("right", "skipped")
            ]
            found[operation] = {"passed": sum(r["outcome"] == "right" for r in its), "failed": failed}
    return found


def _counts(records: Sequence[Record]) -> Record:
    found: Record = {}
    for record in records:
        found[record["outcome"]] = found.get(record["outcome"], 0) + 1
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu.collect", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder of a run")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help=argparse.SUPPRESS)
    parser.add_argument("--configs", type=Path, default=CONFIGS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        gpu, content = collect(options.out, checkout(ROOT))
        date = re.sub(r"\D", "", content["date"])
        name = f"{date[:4]}-{date[4:6]}-{date[6:8]}-{date[8:12]}-{content['commit']}.json"
        target = options.results / slug(gpu) / name
        write_json(target, content)
        print(f"{target}: {len(content['cases'])} cases, {len(content['troubles'])} troubles")
        tiles = options.out / TILES
        if tiles.exists():
            read_tuned(tiles)
            write_json(options.configs / f"{slug(gpu)}.json", read_json(tiles))
            print(f"{options.configs / slug(gpu)}.json: tuned tile sizes")
    except (RecordError, TilesError, KeyError) as error:
        reason = f"the records lack {error}" if isinstance(error, KeyError) else str(error)
        print(f"error: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
