"""Check for slowdowns: ratios to FrEIA or the reference in the same run, against the stored ones of this machine.

    make bench-check      python benchmarks/check.py check            compare, under four minutes on two cores
    make bench-update     python benchmarks/check.py update           measure the ratios that later checks compare with
                          python benchmarks/check.py measure --out F  the ratios alone, for `compare`
                          python benchmarks/check.py compare A B      two such files, as CI does for base and head

Absolute times depend on the machine's other load; the ratio to a contender that is timed in turn hardly does. A
comparison fails when its ratio is below the stored band in two measurements in a row.
Exit status: 0 nothing is slower, 1 something is, 2 the question cannot be answered (no baseline, a contender failed).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from harness import Comparison, machine_kind, measure, stamped, tracked, where  # noqa: E402

from fastbgad.system.files import write_json  # noqa: E402

BASELINES = Path(__file__).parent / "baselines"
SUITES = (
    "bench_flow",
    "bench_spp_loss",
    "bench_score_map",
    "bench_log_likelihood",
    "bench_boundary",
    "bench_metrics",
    "bench_backbone",
    "bench_inference",
    "bench_training",
    "bench_accelerate",
)
ANY_CPU = "any-cpu"  # what holds on every CPU: floors, for machines without a baseline of their own
UPDATE_REPEATS = 3
# The largest share by which a ratio may fall before it counts: 30 % more time is 23 % less.
LARGEST_BAND = 0.18
# With --floors: on shared machines ratios have been seen to fall by this much while nothing had changed.
SHARED_MACHINE_BAND = 0.3


class UnansweredError(Exception):
    """The question cannot be answered; the message says why and what to do."""


@dataclass(frozen=True)
class Ratio:
    """Speed of fastbgad relative to the baseline contender."""

    speed: float
    ours: str
    against: str


@dataclass(frozen=True)
class Verdict:
    """One comparison held against its baseline."""

    name: str
    stored: float
    floor: float
    measured: tuple[float, ...]  # one, or two where the first was too low

    @property
    def slower(self) -> bool:
        return all(speed < self.floor for speed in self.measured)


def tracked_comparisons() -> list[Comparison]:
    """Return the comparisons that are tracked, from all suites."""
    found = [comparison for suite in SUITES for comparison in importlib.import_module(suite).comparisons()]
    return [comparison for comparison in found if comparison.track]


def ratio_of(comparison: Comparison) -> Ratio:
    """Measure one comparison, only with its baseline and ours."""
    quick = dataclasses.replace(comparison, memory=False)
    result = measure(quick, only=(comparison.baseline, *comparison.ours))
    entries = result["contenders"]
    for name, entry in entries.items():
        if "failed" in entry:
            raise UnansweredError(f"{comparison.name}: {name} {entry['failed']}; nothing can be said about its speed")
    ours = tracked(comparison, result)
    if ours is None:
        raise UnansweredError(f"{comparison.name}: no contender of fastbgad was timed: {entries}")
    return Ratio(entries[ours]["speed"], ours, comparison.baseline)


def load_baseline(kind: str, floors: bool) -> dict[str, dict[str, Any]]:
    """name -> {"speed", "band", "ours", "against"}.

    Raises:
        UnansweredError: there is none for this kind of machine and `floors` is not allowed to stand in.
    """
    path = BASELINES / f"{kind}.json"
    if not path.exists() and floors:
        print(f"NO BASELINE for {kind}: only the floors of {ANY_CPU}.json are checked; `make bench-update` makes one.")
        path = BASELINES / f"{ANY_CPU}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in BASELINES.glob("*.json"))) or "none"
        raise UnansweredError(
            f"no baseline for this kind of machine ({kind}): {path} is missing; there are: {known}. "
            "Run `make bench-update` here on the version to compare with, and commit the file."
        )
    try:
        content = json.loads(path.read_text())
        if path.stem != ANY_CPU and content["kind"] != kind:
            raise UnansweredError(
                f"{path} holds ratios of another kind of machine ({content['kind']}, this is {kind}); "
                "they cannot be compared. Run `make bench-update` here."
            )
        ratios: dict[str, dict[str, Any]] = content["ratios"]
        if floors and path.stem != ANY_CPU:
            ratios = {name: {**one, "band": max(one["band"], SHARED_MACHINE_BAND)} for name, one in ratios.items()}
        return ratios
    except (ValueError, KeyError, TypeError) as error:
        raise UnansweredError(
            f"{path} is damaged ({error!r}); restore it from git or run `make bench-update`"
        ) from error


def check(
    comparisons: Sequence[Comparison],
    baseline: Mapping[str, Mapping[str, Any]],
    measure_ratio: Callable[[Comparison], Ratio] = ratio_of,
) -> list[Verdict]:
    """Compare every ratio with its stored one, and measure again at once where one looks slower.

    Raises:
        UnansweredError: a comparison has no stored ratio, or its contenders are not those of the baseline.
    """
    missing = [comparison.name for comparison in comparisons if comparison.name not in baseline]
    if missing:
        raise UnansweredError(
            f"no stored ratio for: {'; '.join(missing)}. Run `make bench-update` and commit the file."
        )
    verdicts = []
    for comparison in comparisons:
        stored = baseline[comparison.name]
        floor = stored["speed"] * (1 - stored["band"])
        measured = []
        for _ in range(2):
            ratio = measure_ratio(comparison)
            if (ratio.ours, ratio.against) != (stored["ours"], stored["against"]):
                raise UnansweredError(
                    f"{comparison.name}: measured {ratio.ours} against {ratio.against}, but the baseline has "
                    f"{stored['ours']} against {stored['against']}. Run `make bench-update`."
                )
            measured.append(ratio.speed)
            if ratio.speed >= floor:
                break
            print(f"{comparison.name}: {ratio.speed:.2f}x is below {floor:.2f}x; measuring again", flush=True)
        verdicts.append(Verdict(comparison.name, stored["speed"], floor, tuple(measured)))
        print(line(verdicts[-1]), flush=True)
    return verdicts


def line(verdict: Verdict) -> str:
    measured = ", ".join(f"{speed:.2f}x" for speed in verdict.measured)
    state = "SLOWER" if verdict.slower else "ok"
    return (
        f"{state:<7} {verdict.name:<58} {verdict.stored:>6.2f}x stored, at least {verdict.floor:>5.2f}x, now {measured}"
    )


def update(
    comparisons: Sequence[Comparison],
    measure_ratio: Callable[[Comparison], Ratio] = ratio_of,
    repeats: int = UPDATE_REPEATS,
) -> dict[str, dict[str, Any]]:
    """Stored ratios: the median of some repeats; the band is twice as wide as these differ, or `Comparison.band`."""
    found: dict[str, dict[str, Any]] = {}
    for comparison in comparisons:
        ratios = [measure_ratio(comparison) for _ in range(repeats)]
        speeds = [ratio.speed for ratio in ratios]
        middle = statistics.median(speeds)
        spread = 2 * max(abs(speed - middle) for speed in speeds) / middle
        band = min(LARGEST_BAND, max(comparison.band, spread))
        found[comparison.name] = {
            "speed": round(middle, 3),
            "band": round(band, 3),
            "ours": ratios[0].ours,
            "against": ratios[0].against,
        }
        print(f"{comparison.name}: {', '.join(f'{speed:.2f}x' for speed in speeds)}; band {band:.0%}", flush=True)
        if spread > LARGEST_BAND:
            print(f"  the repeats differ by more than the largest band ({LARGEST_BAND:.0%}): is the machine busy?")
    return found


def compare(base: Mapping[str, Any], head: Mapping[str, Any], markdown: bool) -> tuple[str, bool]:
    """A table of two files that `measure` wrote on one machine, and whether head is slower anywhere.

    Raises:
        UnansweredError: the files come from different kinds of machines.
    """
    if base["kind"] != head["kind"]:
        raise UnansweredError(f"the files come from different kinds of machines: {base['kind']} and {head['kind']}")
    rows, slower = [], False
    for name in {**base["ratios"], **head["ratios"]}:
        before, after = base["ratios"].get(name), head["ratios"].get(name)
        if before is None or after is None:
            rows.append((name, _speed(before), _speed(after), "new" if before is None else "gone"))
            continue
        change = after["speed"] / before["speed"] - 1
        worse = change < -max(before["band"], after["band"])
        slower |= worse
        rows.append((name, _speed(before), _speed(after), f"{change:+.0%}{' SLOWER' if worse else ''}"))
    header = ("comparison", "base", "head", "change")
    if markdown:
        lines = [
            f"| {' | '.join(header)} |",
            "| --- | ---: | ---: | ---: |",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
        note = f"Speed against FrEIA, the oracle or the official code in the same run, on {head['where']}."
        return "\n".join([*lines, "", note]), slower
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in [header, *rows]
    ), slower


def _speed(entry: Mapping[str, Any] | None) -> str:
    return "-" if entry is None else f"{entry['speed']:.2f}x"


def document(ratios: Mapping[str, Any]) -> dict[str, Any]:
    """A file of ratios: what, where, when."""
    facts = stamped({})
    return {"kind": machine_kind(), "where": where(), **facts, "ratios": ratios}


def read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
        return {key: content[key] for key in ("kind", "where", "ratios")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnansweredError(f"{path} is not a file of ratios ({error!r}); `check.py measure` writes one") from error


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="compare with the baseline of this kind of machine")
    checking.add_argument(
        "--floors",
        action="store_true",
        help=f"for shared machines, such as CI's: a band of {SHARED_MACHINE_BAND:.0%}, and where there is no baseline "
        f"the floors of {ANY_CPU}.json",
    )
    updating = commands.add_parser("update", help="write the baseline of this kind of machine")
    for one in (checking, updating):
        one.add_argument("--only", default="", help="only comparisons whose name contains this")
    measuring = commands.add_parser("measure", help="write the ratios to a file")
    measuring.add_argument("--out", required=True, help="file to write")
    measuring.add_argument("--repeats", type=int, default=2, help="measurements of each comparison")
    comparing = commands.add_parser("compare", help="compare two files that `measure` wrote on one machine")
    comparing.add_argument("base")
    comparing.add_argument("head")
    comparing.add_argument("--markdown", action="store_true", help="a table for a comment")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command == "compare":
            text, slower = compare(read(options.base), read(options.head), options.markdown)
            print(text)
            return int(slower)
        comparisons = [c for c in tracked_comparisons() if getattr(options, "only", "") in c.name]
        if not comparisons:
            raise UnansweredError(f"no tracked comparison is named like {options.only!r}")
        if options.command == "measure":
            write_json(options.out, document(update(comparisons, repeats=options.repeats)))
            return 0
        path = BASELINES / f"{machine_kind()}.json"
        if options.command == "update":
            kept = json.loads(path.read_text())["ratios"] if path.exists() and options.only else {}
            BASELINES.mkdir(exist_ok=True)
            write_json(path, document({**kept, **update(comparisons)}))
            print(f"wrote {path.name}")
            return 0
        print(f"speed of fastbgad against a contender timed in turn; {where()}")
        baseline = load_baseline(machine_kind(), options.floors)
        verdicts = check(comparisons, baseline)
    except UnansweredError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    slower = [verdict for verdict in verdicts if verdict.slower]
    if slower:
        print("\nslower than the band in two measurements in a row:")
        print("\n".join(line(verdict) for verdict in slower))
        print("If that is meant to be, `make bench-update` and say why in the commit.")
    faster = [verdict.name for verdict in verdicts if verdict.measured[-1] > 1.25 * verdict.stored]
    if faster:
        print(f"\nfaster than stored by a quarter or more, `make bench-update` keeps it: {'; '.join(faster)}")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
