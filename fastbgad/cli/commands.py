"""What each command does: opens its input, calls the library, prints and writes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch

from ..backbones import Backbone, create_backbone
from ..config import METHOD_NAMES, TrainConfig, demo_preset
from ..convert.conversion import convert
from ..data import Sample, Split, make_demo_dataset, open_category, split_known_anomalies
from ..errors import BackboneError, ConfigError
from ..evaluate import Evaluation, evaluate_model, false_alarms, metrics_dict, run_report
from ..evaluate.metrics import official_pro
from ..evaluate.report import RunReport, write_report
from ..export.detector import export_detector
from ..model.detector import BGAD
from ..predict.local import find_images, predict_files
from ..render import console
from ..system.environment import choose_device, machine, versions
from ..system.files import make_folder, write_json
from ..system.ranks import device_of, find_rank, threads_of
from ..train.data_parallel import DataParallel, process_group
from ..train.fit import MODEL_FILE, STATE_FILE, FitResult, fit
from .bench import bench
from .parser import Bench, Command, Convert, Demo, Evaluate, Export, Info, Predict, Reproduce, Train
from .predict import predict_by_ray, print_outcome
from .reproduce import reproduce

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
# The demo's photographs are 192 pixels wide; enlarged, their thin scratches fill more of a feature cell.
DEMO_IMAGE_SIZE = 288
_COLUMNS = ("image AUROC", "pixel AUROC", "AUPRO")


@singledispatch
def run(command: Command) -> int:
    """Carries out a command of `fastbgad.cli.parser`; returns its exit code."""
    raise TypeError(f"no such command: {command!r}")


# -------------------------------------------------------------------- train


@run.register
def _train(command: Train) -> int:
    config = command.training
    place = find_rank()
    device = device_of(place, command.device)
    threads = threads_of(place)
    if threads is not None:
        torch.set_num_threads(threads)
    # Each file need be checked by one process only.
    check = command.check if place.is_first else "none"
    category = open_category(command.data, command.category, command.layout, check)
    wanted = config.anomalies.num_anomalies if config.uses_anomalies else 0
    split = split_known_anomalies(category, wanted, config.anomalies.per_type, config.seed, command.types or None)
    model = _new_model(command, device)
    if place.is_first:
        shared = f", {place.world} processes" if place.world > 1 else ""
        print(
            f"{category.name}: {len(split.normals)} normal images, {len(split.known_anomalies)} known anomalies, "
            f"{len(split.test)} test images; {METHOD_NAMES[config.method]} on {device}{shared}"
        )
    bar = console.training_bar(category.name) if place.is_first else nullcontext()
    with process_group(place, device) as parallel, bar as on_progress:
        if parallel is not None:
            _check_same_weights(model, parallel, device)
        result = fit(
            model,
            split,
            config,
            run_dir=command.out,
            resume=command.resume,
            placement=command.placement,
            workers=command.workers,
            parallel=parallel,
            on_progress=on_progress,
        )
    if not place.is_first:
        return 0
    evaluation = _evaluate_with_bar(category.name, model, split.test, command.workers)
    _write_metrics(command.out, model, evaluation, result)
    _print_metrics([(category.name, METHOD_NAMES[config.method], evaluation)])
    _print_decisions(false_alarms(model, evaluation))
    if command.report:
        run_ = _report_of(category.name, config, model, evaluation, result)
        write_report(command.out / REPORT_FILE, [run_], f"{category.name}: {METHOD_NAMES[config.method]}")
        print(f"report: {command.out / REPORT_FILE}")
    print(f"model:  {command.out / MODEL_FILE}")
    return 0


def _new_model(command: Train, device: torch.device) -> BGAD:
    config = command.training
    options: dict[str, Any] = {}
    if command.backbone != "gabor":
        options = {
            "weights": command.weights,
            "seed": config.seed,
            "dtype": command.dtype,
            "compile": command.compile,
            "standardize": command.standardize,
            "neighborhood": command.neighborhood,
        }
    return BGAD(
        create_backbone(command.backbone, command.levels, **options).to(device),
        command.image_size,
        flow=config.flow,
        normalizer=config.loss.normalizer,
        seed=config.seed,
        impl=command.impl,
        precision=command.precision,
    ).to(device)


def _check_same_weights(model: BGAD, parallel: DataParallel, device: torch.device) -> None:
    """Refuse a shared training in which some processes reached the hub and others took the weights of a package."""
    packaged = getattr(model.backbone, "weights_source", None) == "package"
    count = int(parallel.sum(torch.tensor(int(packaged), device=device)))
    if count not in (0, parallel.world):
        raise BackboneError(
            f"{count} of {parallel.world} processes could not reach the hub and took the backbone's weights from a "
            "package, the others from the hub; give --weights package, so that all have the same"
        )


def _evaluate_with_bar(title: str, model: BGAD, samples: Sequence[Sample], workers: int, **options: Any) -> Evaluation:
    with console.image_bar(f"{title} · test", len(samples)) as on_images:
        return evaluate_model(model, samples, workers=workers, on_images=on_images, **options)


def _write_metrics(folder: Path, model: BGAD, evaluation: Evaluation, result: FitResult | None = None) -> None:
    content = {**metrics_dict(evaluation.metrics), **false_alarms(model, evaluation)}
    if result is not None:
        content |= {"seconds": result.seconds, "feature_seconds": result.feature_seconds}
    write_json(folder / METRICS_FILE, {**content, "machine": machine(), "versions": versions()})


def _print_metrics(rows: Sequence[tuple[str, str, Evaluation]]) -> None:
    console.print_table(
        "Test images",
        ("category", "method", *_COLUMNS),
        [(category, method, *_figures(evaluation)) for category, method, evaluation in rows],
    )


def _print_decisions(shares: Mapping[str, float]) -> None:
    """Prints what the explicit boundary catches and what it falsely alarms; nothing for a model without one."""
    rows = [
        (edge, f"{shares[f'anomalous_images_beyond_{edge}']:.1%}", f"{shares[f'normal_images_beyond_{edge}']:.1%}")
        for edge in ("b_n", "b_a")
        if shares
    ]
    if rows:
        console.print_table("Test images beyond the boundary", ("boundary", "anomalous", "normal"), rows)


def _figures(evaluation: Evaluation) -> tuple[float, float, float]:
    metrics = evaluation.metrics
    return metrics.image_auroc, metrics.pixel_auroc, metrics.aupro


def _report_of(category: str, config: TrainConfig, model: BGAD, evaluation: Evaluation, result: FitResult) -> RunReport:
    return run_report(
        category,
        METHOD_NAMES[config.method],
        model,
        evaluation,
        history=result.history,
        seconds=result.seconds,
        config={"architecture": model.architecture(), "training": config.as_dict(), "machine": machine()},
        versions=versions(),
    )


# -------------------------------------------------------------------- demo


@run.register
def _demo(command: Demo) -> int:
    started = time.perf_counter()
    out, device = make_folder(command.out), choose_device(command.device)
    known = make_demo_dataset(out / "data", seed=command.seed)
    if not command.categories or not command.methods:
        raise ConfigError("give at least one category and one method, or leave the options out")
    for name in command.categories:
        if name not in known:
            raise ConfigError(f"the demo has no category {name!r}; choose from {', '.join(known)}")
    print(f"data: {out / 'data'} ({time.perf_counter() - started:.0f} s)", flush=True)
    options: dict[str, Any] = {} if command.backbone == "gabor" else {"weights": command.weights}
    backbone = create_backbone(command.backbone, **options).to(device)  # its statistics are those of each texture
    rows, reports = [], []
    for name in command.categories:
        # One split for all methods: the test set must not depend on whether a method uses the known anomalies.
        category = open_category(out / "data", name)
        split = split_known_anomalies(category, command.num_anomalies, seed=command.seed)
        for method in command.methods:
            config = demo_preset(method, command.seed)
            config = replace(config, anomalies=replace(config.anomalies, num_anomalies=command.num_anomalies))
            folder = method if command.backbone == "gabor" else f"{method}-{command.backbone}"
            model, evaluation, result = _demo_run(
                name, split, config, out / name / folder, backbone.without_statistics()
            )
            rows.append((name, METHOD_NAMES[method], evaluation))
            reports.append(_report_of(name, config, model, evaluation, result))
    write_report(out / REPORT_FILE, reports, "BGAD on brick, grass and gravel")
    _print_demo(rows, [METHOD_NAMES[method] for method in command.methods])
    print(f"report: {out / REPORT_FILE}\ntotal: {time.perf_counter() - started:.0f} s")
    return 0


def _demo_run(
    name: str, split: Split, config: TrainConfig, folder: Path, backbone: Backbone
) -> tuple[BGAD, Evaluation, FitResult]:
    """One method on one texture. A run that stopped half-way is taken up; a finished one is loaded."""
    method = METHOD_NAMES[config.method]
    size = (DEMO_IMAGE_SIZE, DEMO_IMAGE_SIZE)
    model = BGAD(backbone, size, flow=config.flow, normalizer=config.loss.normalizer, seed=config.seed)
    model = model.to(next(backbone.buffers()).device)
    resume = (folder / STATE_FILE).is_file()
    with console.training_bar(f"{name} · {method}") as on_progress:
        result = fit(model, split, config, run_dir=folder, resume=resume, on_progress=on_progress)
    evaluation = evaluate_model(model, split.test)
    _write_metrics(folder, model, evaluation, result)
    figures = "  ".join(f"{c} {f:.4f}" for c, f in zip(_COLUMNS, _figures(evaluation), strict=True))
    print(f"{name} · {method}: {figures}  ({result.seconds:.0f} s)", flush=True)
    return model, evaluation, result


def _print_demo(rows: Sequence[tuple[str, str, Evaluation]], methods: Sequence[str]) -> None:
    table: list[tuple[object, ...]] = [(name, method, *_figures(evaluation)) for name, method, evaluation in rows]
    for method in methods:
        figures = [_figures(evaluation) for _, m, evaluation in rows if m == method]
        table.append(("mean", method, *(sum(column) / len(figures) for column in zip(*figures, strict=True))))
    console.print_table("Test images of the demo", ("category", "method", *_COLUMNS), table)


# ---------------------------------------------------------------- evaluate


@run.register
def _evaluate(command: Evaluate) -> int:
    model = BGAD.load(command.model, device=choose_device(command.device))
    category = open_category(command.data, command.category, command.layout, command.check)
    known = set(model.history.get("known_anomalies", ()))
    samples = [s for s in category.test if s.name not in known]
    if len(samples) < len(category.test):
        print(f"left out: {len(category.test) - len(samples)} test images that the model was trained on")
    evaluation = _evaluate_with_bar(
        category.name,
        model,
        samples,
        command.workers,
        calibration=command.calibration,
        pro_limit=command.pro_limit,
    )
    _print_metrics([(category.name, _method_of(model), evaluation)])
    _print_decisions(false_alarms(model, evaluation))
    facts: dict[str, object] = {}
    if command.official_pro:
        pro = official_pro(evaluation.maps, evaluation.masks, command.pro_limit)
        facts["official PRO"] = f"{pro:.4f}"
    if not model.calibrated:
        facts["decisions"] = "none: the model has no calibration"
    if facts:
        console.print_facts(facts)
    if command.out is not None:
        _write_metrics(make_folder(command.out), model, evaluation)
        config = {"architecture": model.architecture(), "training": model.history.get("config", {})}
        report = run_report(
            category.name,
            _method_of(model),
            model,
            evaluation,
            history=model.history.get("passes", []),
            config=config,
            versions=versions(),
        )
        write_report(command.out / REPORT_FILE, [report], f"{category.name}: {_method_of(model)}")
        print(f"report: {command.out / REPORT_FILE}")
    return 0


def _method_of(model: BGAD) -> str:
    method = model.history.get("config", {}).get("method", "")
    return METHOD_NAMES.get(method, "model")


# ----------------------------------------------------------------- predict


@run.register
def _predict(command: Predict) -> int:
    if command.engine == "ray":
        return predict_by_ray(command)
    model = BGAD.load(command.model, device=choose_device(command.device))
    images = find_images(command.images)
    with console.image_bar("predict", len(images)) as on_images:
        summary = predict_files(
            model,
            images,
            command.out,
            maps=command.maps,
            resume=command.resume,
            batch_size=command.batch_size,
            workers=command.workers,
            on_images=on_images,
        )
    return print_outcome(command, summary.scored, summary.skipped, len(summary.failed), summary.failed)


# ------------------------------------------------------------------- bench

run.register(Bench, bench)


# --------------------------------------------------------------- reproduce

run.register(Reproduce, reproduce)


# ----------------------------------------------------------------- convert


@run.register
def _convert(command: Convert) -> int:
    normals: tuple[Sample, ...] = ()
    if command.data is not None:
        normals = open_category(command.data, command.category, command.layout, command.check).train
    with console.image_bar("calibration", len(normals)) if normals else nullcontext() as on_images:
        conversion = convert(
            command.source,
            command.out,
            command.to,
            command.reading,
            normals=normals,
            beta=command.beta,
            tau=command.tau,
            force=command.force,
            device=choose_device(command.device),
            workers=command.workers,
            on_images=on_images,
        )
    console.print_facts(conversion.facts)
    for note in conversion.notes:
        print(f"note: {note}")
    return 0


# ------------------------------------------------------------------ export


@run.register
def _export(command: Export) -> int:
    model = BGAD.load(command.model)
    summary = export_detector(model, command.out, command.format, device=command.device)
    console.print_facts(summary.facts())
    return 0


# -------------------------------------------------------------------- info


@run.register
def _info(command: Info) -> int:
    console.print_facts({**versions(), **machine()})
    if command.model is not None:
        model = BGAD.load(command.model)
        edges = ", ".join(f"{edge:.4f}" for edge in model.thresholds()) if model.calibrated else "no calibration"
        print()
        facts: dict[str, object] = {
            "model": command.model,
            "method": _method_of(model),
            "parameters of the flows": f"{sum(p.numel() for p in model.flows.parameters() if p.requires_grad):,}",
            "score at b_n, b_a": edges,
            "passes trained": len(model.history.get("passes", [])),
            "known anomalies": len(model.history.get("known_anomalies", [])),
        }
        console.print_facts(facts)
        print(json.dumps(model.architecture(), indent=2))
    return 0
