"""Write the performance page, benchmarks/README.md with its pictures, from the result files; never edit it by hand.

    make bench-page       python benchmarks/page.py            write the page
                          python benchmarks/page.py --check    exit status 1 if the page does not fit the result files

The same result files give the same bytes. Exit status 2: a result file is damaged.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from floors import (  # noqa: E402
    CHIPS,
    backbone_flops,
    backbone_share,
    floor_seconds,
    freia_flops,
    freia_training_flops,
    limited_by_memory,
    training_flops,
)
from page_output import differences, table, write_files  # noqa: E402
from page_plots import Family, Line, families, lines, picture  # noqa: E402
from page_sources import PageError, Source, read_sources  # noqa: E402
from roofline import LEVELS, flow_bytes, flow_flops, image_bytes, image_flops  # noqa: E402

RESOLUTIONS = (256, 512, 1024, 2048, 4096)
KERNELS = "fastbgad triton"
UNMEASURED = """\
| on one GPU | |
| --- | --- |
| three levels of a 1024-pixel image, against FrEIA eager and under torch.compile | not yet measured |
| 4096-patch training step at C = 40 in a CUDA graph, against FrEIA's step | not yet measured |
| loss with boundary, a million patches, against boolean indexing | not yet measured |
| peak memory of a training step, against FrEIA's autograd | not yet measured |"""


def page(sources: Sequence[Source]) -> dict[str, str]:
    """Return the files of the page, README.md and pictures/*.svg, name -> content."""
    pictures: dict[str, str] = {}
    sections = [
        HEAD,
        *roofline_section(sources),
        *measured_section(sources),
        *plot_section(
            sources,
            pictures,
            "median_ms",
            "How times grow",
            "median milliseconds",
            "Medians of interleaved calls; both axes are logarithmic.",
        ),
        *plot_section(
            sources,
            pictures,
            "peak_mib",
            "Memory",
            "peak memory in MiB",
            "What one call takes at its peak, beyond what is allocated before it; both axes are logarithmic.",
        ),
        *unmeasured_section(sources),
    ]
    return {"README.md": "\n\n".join(sections) + "\n", **pictures}


HEAD = """\
<!-- Written by benchmarks/page.py from benchmarks/results; do not edit. -->

# Performance

How much work there is, how long it takes, and against what. Every measured figure comes from a file in
`benchmarks/results/` that a command wrote; `make bench-page` turns these files into this page, and
`python benchmarks/page.py --check` says whether the page is what they give.

| command | |
| --- | --- |
| `make bench` | times all contenders side by side on this machine and keeps the figures in `results/<machine>.json` |
| `make bench-check` | tells from ratios whether anything has become slower |
| `make gpu` | on a CUDA GPU: every kernel checked, timed and tuned; its figures go into `results/<gpu>/` |
| `make bench-page` | writes this page |

A contender is compared with the oracle before it is timed; one that differs is reported as failed and has no time.
Contenders take turns, one call of each at a time, so that whatever else a machine does falls on all of them alike.
Absolute times hold for the machine named; ratios travel better."""

WORK = """\
What the flow needs for an image, whatever computes it: the operations of its matrix products (two per multiply-add,
8 coupling layers, the 128 positional channels taken from tables), and the bytes that must cross the memory (float32
features in, log-likelihoods out; the weights stay in the cache). C is the number of channels of a level of
tf_efficientnet_b6. A floor is the larger of the two times at a chip's best rates: nothing is faster than that with the
same arithmetic, and nothing reaches it."""

FREIA_WORK = """\
FrEIA multiplies the finished condition of every patch with the 128 columns of W1 that belong to it, and carries out the
last permutation, on which the log-likelihood does not depend. Operations per patch, of inference and of a training step
(forward and backward, every activation kept):"""

SPEED = """\
Speed is the baseline's median time over the contender's, in the same run; above 1x is faster than the baseline. The
error is the largest one relative to the oracle. The fastest is bold."""

NO_GPU = """\
There is no result file of a GPU yet: what the kernels reach there is not known, and no floor above was held against a
time. On a machine with a GPU, `make gpu` measures it; please send us the folder it writes."""


def roofline_section(sources: Sequence[Source]) -> Iterator[str]:
    yield "## Arithmetic, memory traffic and floors"
    yield WORK
    measured = [(source.label, source.chip) for source in sources if source.chip is not None]
    chips = [*CHIPS, *(chip for _, chip in measured)]
    origins = ["NVIDIA's data sheet"] * len(CHIPS) + [f"measured, `{label}`" for label, _ in measured]
    header = ["chip", "matrix products, TFLOP/s", "memory, TB/s", "limited by memory below, FLOP per byte", "source"]
    rows = []
    for chip, origin in zip(chips, origins, strict=True):
        rates = [_significant(1e-12 * rate) for rate in (chip.flops_per_second, chip.bytes_per_second)]
        rows.append([_plain(chip.name), *rates, f"{chip.flops_per_second / chip.bytes_per_second:.0f}", origin])
    yield table(header, rows, left=(0, 4))
    yield "Published rates are those of dense float16 products, measured ones of a large product and a large copy."
    header = ["image", "C", "patches", "GFLOP", "MB", "FLOP per byte", *(f"{_plain(chip.name)}, µs" for chip in chips)]
    rows, marked = [], False
    for pixels in RESOLUTIONS:
        counts = [(channels, (pixels // stride) ** 2) for channels, stride in LEVELS]
        work = [(str(channels), n, flow_flops(n, channels), flow_bytes(n, channels)) for channels, n in counts]
        work.append(("all", sum(n for _, n in counts), image_flops(pixels), image_bytes(pixels)))
        for channels, count, flops, bytes_ in work:
            cells = []
            for chip in chips:
                limited = limited_by_memory(flops, bytes_, chip)
                marked |= limited
                cells.append(f"{_significant(1e6 * floor_seconds(flops, bytes_, chip))}{' †' if limited else ''}")
            figures = (_significant(1e-9 * flops), _significant(1e-6 * bytes_), f"{flops / bytes_:.0f}")
            row = [f"{pixels} px", channels, str(count), *figures, *cells]
            rows.append([f"**{cell}**" for cell in row] if channels == "all" else row)
    yield table(header, rows)
    if marked:
        yield "† limited by the memory; all others by the matrix products."
    else:
        yield "The limit is always the matrix products, never the memory: one pass over the features is cheap."
    yield FREIA_WORK
    rows = []
    for c, _ in LEVELS:
        ours, theirs = flow_flops(1, c), freia_flops(1, c)
        step, their_step = training_flops(1, c), freia_training_flops(1, c)
        ratios = [f"{theirs / ours:.2f}", f"{their_step / step:.2f}"]
        rows.append([str(c), str(ours), str(theirs), ratios[0], str(step), str(their_step), ratios[1]])
    yield table(["C", "inference, FLOP", "FrEIA's", "ratio", "training, FLOP", "FrEIA's", "ratio"], rows)
    yield "The backbone, tf_efficientnet_b6 cut off after its third level, beside the flow:"
    yield table(
        ["image", "backbone, GFLOP", "flow, GFLOP", "backbone's share", "FrEIA's flow, GFLOP"],
        [
            [
                f"{pixels} px",
                _significant(1e-9 * backbone_flops(pixels)),
                _significant(1e-9 * image_flops(pixels)),
                f"{backbone_share(pixels):.0%}",
                _significant(1e-9 * sum(freia_flops((pixels // stride) ** 2, c) for c, stride in LEVELS)),
            ]
            for pixels in RESOLUTIONS
        ],
    )
    yield "The arithmetic is in `benchmarks/roofline.py` and `benchmarks/floors.py`."


def measured_section(sources: Sequence[Source]) -> Iterator[str]:
    yield "## Measured"
    if not sources:
        yield "Not yet measured: there is no result file."
        return
    yield SPEED
    for source in sources:
        yield f"### {_plain(source.machine)}\n\n[`{source.label}`]({source.label})"
        facts = list(dict.fromkeys(_facts(result) for result in source.results))
        if len(facts) == 1:
            yield f"<sub>{facts[0]}</sub>"
        if source.notes:
            yield "\n".join(f"- {_plain(note)}" for note in source.notes)
        for result in source.results:
            yield f"#### {_plain(result['name'])}"
            yield from _comparison(result, _facts(result) if len(facts) > 1 else "")


def _comparison(result: Mapping[str, Any], facts: str) -> Iterator[str]:
    if "refused" in result:
        yield f"Not timed: {_plain(result['refused'])}."
    entries: Mapping[str, Mapping[str, Any]] = result["contenders"]
    timed = {name: entry for name, entry in entries.items() if "median_ms" in entry}
    columns = [
        ("median ms", "median_ms", _significant),
        ("speed", "speed", lambda value: f"{value:.2f}x"),
        ("largest error", "error", lambda value: f"{value:.0e}" if value else "0"),
        ("images/s", "images_per_s", _significant),
        ("peak MiB", "peak_mib", lambda value: f"{value:.0f}" if value >= 10 else f"{value:.1f}"),
        ("of the floor", "of_floor", lambda value: f"{value:.0%}"),
    ]
    columns = [c for c in columns if any(entry.get(c[1]) is not None for entry in timed.values())]
    if timed:
        fastest = min(timed, key=lambda name: timed[name]["median_ms"])
        rows = [
            [
                f"**{_plain(name)}**" if name == fastest and len(timed) > 1 else _plain(name),
                *(show(entry[key]) if entry.get(key) is not None else "-" for _, key, show in columns),
            ]
            for name, entry in timed.items()
        ]
        yield table(["contender", *(title for title, _, _ in columns)], rows)
    for how in ("failed", "skipped"):
        reasons = [f"{_plain(name)} ({_plain(entry[how])})" for name, entry in entries.items() if how in entry]
        if reasons:
            yield f"{how.capitalize()}: {'; '.join(reasons)}."
    small = [f"against {_plain(result['baseline'])}"] if result.get("baseline") else []
    small += [f"{result['rounds']} rounds"] if result.get("rounds") else []
    small += [facts] if facts else []
    if small:
        yield f"<sub>{'; '.join(small)}</sub>"


def _facts(result: Mapping[str, Any]) -> str:
    """Return date, commit and versions, if the file holds them."""
    facts = [str(result["date"])] if result.get("date") else []
    facts += [f"commit {result['commit']}"] if result.get("commit") else []
    facts += [f"{name} {version}" for name, version in (result.get("versions") or {}).items()]
    return _plain(", ".join(facts))


def plot_section(
    sources: Sequence[Source], pictures: dict[str, str], figure: str, title: str, unit: str, about: str
) -> Iterator[str]:
    """Yield a section with a picture for every family that has this figure, and add the pictures to `pictures`."""
    yield f"## {title}"
    blocks = []
    for source in sources:
        found = [(family, lines(family, figure)) for family in families(source.results)]
        found = [(family, drawn) for family, drawn in found if drawn]
        if found:
            blocks.append(f"### {title}: {_plain(source.machine)}")
        for family, drawn in found:
            stem = f"{source.slug}-{family.slug}{'-memory' if figure == 'peak_mib' else ''}"
            alike = sum(name.startswith(f"pictures/{stem}.") for name in pictures)  # told apart by other sizes only
            name = f"pictures/{stem}{f'.{alike + 1}' if alike else ''}.svg"
            pictures[name] = picture(family, drawn, unit)
            blocks.append(_picture_block(name, family, drawn, figure, unit))
    if not blocks:
        yield "Not yet measured: no result file has this for three or more sizes of the same operation."
        return
    yield about
    yield from blocks


def _picture_block(name: str, family: Family, drawn: Sequence[Line], figure: str, unit: str) -> str:
    words = f"{family.title} ({', '.join(filter(None, [unit, family.caption]))})"
    shown = {line.name for line in drawn}
    alone = dict.fromkeys(
        contender
        for result in family.results
        for contender, entry in result["contenders"].items()
        if entry.get(figure) is not None and contender not in shown
    )
    block = f'<img src="{name}" width="700" alt="{_plain(words).replace(chr(34), "&quot;")}">'
    if alone:
        block += f"\n\n<sub>Not drawn, for want of a second point: {_plain(', '.join(alone))}.</sub>"
    return block


def unmeasured_section(sources: Sequence[Source]) -> Iterator[str]:
    yield "## Not yet measured"
    entries = [
        (name, entry) for source in sources for result in source.results for name, entry in result["contenders"].items()
    ]
    if not entries:
        yield "There is no result file of any machine yet; the tables of this page are arithmetic."
    timed = {name for name, entry in entries if "median_ms" in entry}
    if not any(name.startswith(KERNELS) for name in timed):
        yield NO_GPU
        yield UNMEASURED
    never: dict[tuple[str, str], int] = {}
    for name, entry in entries:
        if name not in timed:
            how = "failed" if "failed" in entry else "skipped"
            reason = (name, f"{how}: {entry[how]}")
            never[reason] = never.get(reason, 0) + 1
    if never:
        yield "Contenders without a time on any machine:"
        yield table(
            ["contender", "comparisons", "reason"],
            [[_plain(name), str(count), _plain(reason)] for (name, reason), count in never.items()],
            left=(0, 2),
        )
    if not any(source.chip is not None for source in sources):
        yield "No result file names the best rates of its machine yet, so floors are those of published rates."


def _plain(text: str) -> str:
    """Return text with the characters escaped that have a meaning in Markdown."""
    text = " ".join(str(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def _significant(value: float) -> str:
    """Return a number with about three digits, without powers of ten."""
    if value == 0:
        return "0"
    size = abs(value)
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return f"{value:.{decimals}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if `--check` found a difference, 2 if a result file is damaged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--folder", type=Path, default=HERE, help="where README.md and pictures/ belong")
    options = parser.parse_args(arguments)
    try:
        files = page(read_sources(options.results))
    except PageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        found = differences(files, options.folder, "pictures/*")
        if found:
            listed = "\n".join(f"  {line}" for line in found)
            print(f"error: the performance page is out of date; run `make bench-page`:\n{listed}", file=sys.stderr)
        return int(bool(found))
    write_files(files, options.folder, "pictures/*.svg")
    print(f"wrote README.md and {len(files) - 1} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
