"""Show results in a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from .records import TROUBLES, Record

WIDTH = 80
# How much of an error is shown; the records have all of it.
MESSAGE_LINES = 3


def line(record: Record) -> str:
    """Return one result, with its timings and what is wrong with it on lines below."""
    seconds = f"{record['seconds']:.1f} s" if "seconds" in record else ""
    name = record["item"] + (f" ({record['step']})" if "step" in record else "")
    head = f"  {record['outcome']:<9} {name}"
    lines = [f"{head:<{WIDTH - len(seconds)}}{seconds}" if len(head) + len(seconds) < WIDTH else head]
    if record.get("message"):
        wrapped = textwrap.wrap(record["message"], WIDTH - 12)[:MESSAGE_LINES]
        lines += [f"            {text}" for text in wrapped]
    lines += _contenders(record)
    for which in ("card", "cpu"):
        if which in record and record["outcome"] != "rehearsed":
            lines.append(f"            {which}: {_training(record[which])}")
    if "row" in record and record["outcome"] != "rehearsed":
        total = record["row"]["total"]
        if total:
            lines.append(f"            {total['ms_per_image']:.2f} ms per image, {total['images_per_s']:.1f} images/s")
    return "\n".join(lines)


def _contenders(record: Record) -> Iterator[str]:
    for name, entry in record.get("contenders", {}).items():
        how = next((how for how in ("failed", "skipped") if how in entry), None)
        if how is not None:
            text = f"{name}: {how.upper() if how == 'failed' else how}: {entry[how]}"
            yield from textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="      ", max_lines=3)
            continue
        if record["outcome"] == "rehearsed":
            figures = f"{'launched' if 'unchecked' in entry else 'right':>11}"
        else:
            figures = f"{entry['median_us']:>11.1f} us"
            figures += f" {entry['speed']:>6.2f}x" if "speed" in entry else ""
            peak = entry.get("peak_bytes")
            figures += f" {peak / 2**20:>6.0f} MiB" if peak is not None else ""
        yield f"    {name[:42]:<42}{figures}"


def _training(found: Record) -> str:
    text = f"{found['seconds_of_training']:.1f} s" if "seconds_of_training" in found else "no values"
    metrics = found.get("metrics", {})
    names = ("image_auroc", "pixel_auroc", "aupro")
    return ", ".join([text, *(f"{name} {metrics[name]:.4f}" for name in names if name in metrics)])


def summary(records: Sequence[Record]) -> str:
    """Return how many results of each kind every stage has, and those that are not right."""
    stages = list(dict.fromkeys(record["stage"] for record in records))
    lines = ["stage      " + "results"]
    for stage in stages:
        counts = Counter(record["outcome"] for record in records if record["stage"] == stage)
        lines.append(f"{stage:<10} " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    hits = sum(record.get("kernels", {}).get("hits", 0) for record in records)
    compiled = sum(record.get("kernels", {}).get("compiled", 0) for record in records)
    lines.append(f"kernels    {hits} found in Triton's cache, {compiled} compiled")
    bad = [record for record in records if record["outcome"] in TROUBLES]
    if bad:
        lines += ["", "not right:", *(line({**record, "contenders": {}}) for record in bad[:20])]
        lines += [f"  ... and {len(bad) - 20} more in the records"] if len(bad) > 20 else []
    return "\n".join(lines)
