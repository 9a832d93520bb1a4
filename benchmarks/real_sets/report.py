"""REAL.md and its plots, from the kept figures; the same figures give the same bytes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from page_output import table

from fastbgad.wording import count

from .charts import Curve, Dot, accuracy_plot, convergence_plot
from .grid import CONVERGENCE, LEFT_OUT, OURS, TRAINED_PEERS
from .results import METRICS, Result
from .summary import (
    Contender,
    headline,
    measured,
    on_category,
    over_categories,
    shared_categories,
    spread,
    total_seconds,
)

PAGE = "REAL.md"
PLOTS = "plots/real-*.svg"
HEAD = """\
<!-- Written by benchmarks/real.py --page from benchmarks/results/real; do not edit. -->

# Accuracy on real photographs

`python benchmarks/real.py --data DIR` trains and measures, `python benchmarks/real.py --page` collects the figures and
writes this page. Every contender is trained and tested on the same images of the same size: per seed, some anomalous
images (10, at most half) are known to the methods that learn from anomalies and leave the test of all. A deviation is
that between seeds. "Recall" is the largest share of defective test images found by a threshold that alarms at most 1 %
of the normal test images; with fewer than 100 of those it means no false alarm at all. Seconds include decoding and the
backbone, as if the contender ran alone.

The photographs are not ours to publish: most sets are for non-commercial use. Pictures of the anomaly maps are in
`page.html` beside the results of whoever runs the command, and are not committed."""
CONTENDERS = """\
- NFAD, BGAD w/o and BGAD: fastbgad's methods, on the three levels of the features with strides 4, 8 and 16.
- Gaussian per level: one Gaussian for all patches of a level, full covariance; the score of a patch is its squared
  Mahalanobis distance divided by the number of channels. A flow that does not beat it has learned nothing.
- PatchCore, PaDiM, CFA, SuperSimpleNet: run by anomalib on the same backbone with the same weights, never standardized.
  PaDiM and CFA take the levels with strides 4, 8 and 16, PatchCore and SuperSimpleNet 8 and 16: those that their
  authors take of residual networks. PaDiM keeps 100 features, as of ResNet-18. CFA's descriptor has as many channels as
  the levels together. SuperSimpleNet learns from the known anomalies with their masks: an epoch shows every normal
  image once and known anomalies as often in total; batches hold 8 images. Its image score is its own; that of all
  others is the maximum of the map, or PatchCore's weighted one. Epochs are those given in brackets; the authors train
  CFA for 30 and SuperSimpleNet for 300."""


def page_files(collections: Sequence[tuple[str, Sequence[Result]]]) -> dict[str, str]:
    """Return the files of the page, REAL.md and plots/*.svg, name -> content."""
    merged = {str(result.run.path): result for _, results in collections for result in results}
    results = [merged[path] for path in sorted(merged)]
    found = measured(results)
    categories = sorted({result.run.category for results in found.values() for result in results})
    plots: dict[str, str] = {}
    sections = [
        HEAD,
        *_means(found, shared_categories(found), plots),
        *_per_category(found, categories),
        *_decisions(found, categories),
        *_convergence(results, plots),
        f"## Contenders\n\n{CONTENDERS}",
        "Left out:\n\n" + "\n".join(f"- {reason}" for reason in LEFT_OUT.values()),
        *_origin(results, [name for name, _ in collections]),
    ]
    return {PAGE: "\n\n".join(sections) + "\n", **plots}


def readme_table(results: Sequence[Result]) -> str:
    """Return a table of five contenders, means over categories."""
    found = measured(results)
    categories = shared_categories(found)
    chosen = headline(found, categories)
    rows = [_mean_row(contender, found[contender], categories, decimals=3) for contender in chosen]
    return _table(["mean of " + ", ".join(categories), *METRICS.values(), "seconds"], [row[:-1] for row in rows])


def _means(
    found: Mapping[Contender, Sequence[Result]], categories: Sequence[str], plots: dict[str, str]
) -> Iterator[str]:
    yield "## Means over categories"
    if not found:
        yield "Not yet measured."
        return
    yield f"Over {', '.join(categories)}: the largest block of contenders and categories without a gap."
    rows = [_mean_row(contender, results, categories) for contender, results in found.items()]
    header = ["contender", *METRICS.values(), "seconds", "seeds"]
    yield _table(header, [row for row in rows if row[1] != "-"])
    partial = [contender.label for contender, row in zip(found, rows, strict=True) if row[1] == "-"]
    if partial:
        yield f"Without a mean, because a category is missing: {'; '.join(partial)}."
    dots = []
    for contender, results in found.items():
        image = over_categories(results, categories, lambda result: result.metrics["image_auroc"])
        seconds = over_categories(results, categories, total_seconds)
        if image is not None and seconds is not None:
            dots.append(Dot(contender.method, contender.label, seconds.mean, image.mean))
    if dots:
        plots["plots/real-accuracy.svg"] = accuracy_plot(dots)
        yield '<img src="plots/real-accuracy.svg" width="700" alt="Image AUROC against seconds, means over categories">'


def _mean_row(
    contender: Contender, results: Sequence[Result], categories: Sequence[str], decimals: int = 3
) -> list[str]:
    cells = []
    for metric in METRICS:
        found = over_categories(results, categories, lambda result, name=metric: result.metrics[name])  # type: ignore[misc]
        cells.append("-" if found is None else found.text(decimals))
    seconds = over_categories(results, categories, total_seconds)
    seeds = len({result.run.seed for result in results})
    return [contender.label, *cells, "-" if seconds is None else f"{seconds.mean:.0f}", str(seeds)]


def _per_category(found: Mapping[Contender, Sequence[Result]], categories: Sequence[str]) -> Iterator[str]:
    yield "## Per category"
    for category in categories:
        first = next(on_category(results, category)[0] for results in found.values() if on_category(results, category))
        counts = first.images
        about = (
            f"{counts['normals']} normal training images, {counts['known']} known anomalies; test: "
            f"{counts['test_normal']} normal, {counts['test_anomalous']} defective."
        )
        rows = []
        for contender, results in found.items():
            here = on_category(results, category)
            if here:
                figures = [spread([result.metrics[metric] for result in here]).text() for metric in METRICS]
                times = [
                    f"{statistics.fmean(values):.1f}"
                    for values in ([r.training_seconds for r in here], [r.scoring_seconds for r in here])
                ]
                rows.append([contender.label, *figures, *times])
        yield f"### {category}\n\n{about}"
        yield _table(["contender", *METRICS.values(), "training, s", "scoring, s"], rows)


def _decisions(found: Mapping[Contender, Sequence[Result]], categories: Sequence[str]) -> Iterator[str]:
    rows = []
    for category in categories:
        for contender, results in found.items():
            here = [result.decision for result in on_category(results, category) if result.decision is not None]
            if here and contender.method in OURS:
                cells = [
                    f"{statistics.fmean(decision[name] for decision in here):.0%}"
                    for edge in ("b_n", "b_a")
                    for name in (f"normal_beyond_{edge}", f"anomalous_beyond_{edge}")
                ]
                rows.append([category, contender.label, *cells])
    yield "## Decisions"
    if not rows:
        yield "Not yet measured."
        return
    yield (
        "Without a threshold of anybody's choice: the share of test images whose score lies beyond the normal boundary "
        "b_n, and beyond the anomalous one b_a. Means over seeds."
    )
    header = [
        "category",
        "contender",
        "good beyond b_n",
        "defective beyond b_n",
        "good beyond b_a",
        "defective beyond b_a",
    ]
    yield _table(header, rows, left=(0, 1))


def _convergence(results: Sequence[Result], plots: dict[str, str]) -> Iterator[str]:
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        if result.run.setting == CONVERGENCE and result.points:
            groups.setdefault((result.run.features, result.run.size), []).append(result)
    if not groups:
        return
    curves = []
    rows = []
    for (features, size), members in sorted(groups.items()):
        length = min(len(member.points) for member in members)
        mean = [
            {key: statistics.fmean(member.points[step][key] for member in members) for key in members[0].points[step]}
            for step in range(length)
        ]
        label = f"{features}, {size} px"
        metrics = {name: [point[name] for point in mean] for name in ("image_auroc", "pixel_auroc", "aupro")}
        curves.append(Curve(label, [point["seconds"] for point in mean], metrics))
        rows += [
            [
                label,
                f"{point['passes']:.0f}",
                f"{point['seconds']:.0f}",
                *(f"{point[name]:.3f}" for name in metrics),
                str(len(members)),
            ]
            for point in mean
        ]
    yield "## Convergence of BGAD"
    yield (
        "One training with the settings of the demo preset and more passes, measured after every meta epoch and "
        "calibrated as at its end. The learning rate falls to its floor at the last pass. Means over categories and "
        "seeds."
    )
    plots["plots/real-convergence.svg"] = convergence_plot(curves)
    yield '<img src="plots/real-convergence.svg" width="700" alt="Accuracy of BGAD against seconds of training">'
    names = [METRICS[name] for name in ("image_auroc", "pixel_auroc", "aupro")]
    yield _table(["features", "passes", "seconds", *names, "runs"], rows)


def _origin(results: Sequence[Result], names: Sequence[str]) -> Iterator[str]:
    if not results:
        return
    facts = [result.facts for result in results]
    versions = sorted({f"{name} {v}" for each in facts for name, v in (each.get("versions") or {}).items()})
    anomalib = sorted({f"anomalib {each['anomalib']}" for each in facts if "anomalib" in each})
    processors = sorted({f"{each.get('processor')}, {count(int(each.get('threads', 0)), 'thread')}" for each in facts})
    dates = sorted({str(each.get("date")) for each in facts})
    commits = sorted({str(each.get("commit")) for each in facts})
    settings = sorted({result.run.setting for result in results if result.run.method in TRAINED_PEERS})
    lines = [
        f"Figures: {', '.join(f'`results/real/{name}.json`' for name in names)}.",
        f"Measured on {'; '.join(processors)}, {dates[0]} to {dates[-1]}, commit {', '.join(commits)}.",
        f"Versions: {', '.join([*versions, *anomalib])}.",
    ]
    lines += [f"Epochs of trained peers: {', '.join(settings)}."] if settings else []
    yield "## Origin\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    return table(header, [[cell.replace("|", "\\|") for cell in cells] for cells in rows], left)
