"""Is the engine as accurate as the plain loop? Both over seeds and textures of the demo; mean and spread side by side.

    python benchmarks/accuracy.py              runs what benchmarks/accuracy.json lacks, then prints the table
    python benchmarks/accuracy.py --only fit   some of the contenders

The plain loop is the official engine re-stated (`official_engine.py`), FrEIA in float32. A run takes a minute or more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from harness import DEVICE, stamped  # noqa: E402
from official_engine import EngineResult, OfficialEngine, fast_engine  # noqa: E402

from fastbgad.backbones import create_backbone  # noqa: E402
from fastbgad.config import TrainConfig, demo_preset  # noqa: E402
from fastbgad.data import Split, make_demo_dataset, open_category, split_known_anomalies, stream_batches  # noqa: E402
from fastbgad.evaluate.metrics import aupro  # noqa: E402
from fastbgad.model import BGAD  # noqa: E402
from fastbgad.ops import Impl, MatmulPrecision  # noqa: E402
from fastbgad.system.files import write_json  # noqa: E402

FILE = Path(__file__).parent / "accuracy.json"
CATEGORIES, SEEDS, SIZE = ("brick", "grass"), (0, 1, 2), (288, 288)
METRICS = ("image_auroc", "pixel_auroc", "aupro")
PLAIN = "plain loop, FrEIA float32"
if DEVICE.type == "cuda":
    ENGINES: dict[str, tuple[Impl, MatmulPrecision]] = {
        "fit, float16 kernels": ("auto", "float16"),
        "fit, float32 kernels": ("auto", "float32"),
    }
else:
    ENGINES = {
        "fit, float32 native": ("native", "float32"),
        "fit, float32 torch": ("torch", "float32"),
        "fit, bfloat16 products": ("torch", "bfloat16"),
    }


def run(name: str, category: str, seed: int, data: Path) -> EngineResult:
    """Train BGAD once: three meta epochs of two sub-epochs, new synthesized anomalies in every pass.

    Batches are the official ones of 32 images: with fewer, the plain loop never trains the coarsest level.
    """
    split: Split = split_known_anomalies(open_category(data, category, check="none"), 10, seed=seed)
    config: TrainConfig = demo_preset("bgad", seed)
    # As in the official commands, so that both loops label the same cells.
    anomalies = replace(config.anomalies, refresh=1, cell_labels="nearest")
    schedule = replace(config.schedule, meta_epochs=3, batch_size=32)
    config = replace(config, anomalies=anomalies, schedule=schedule)
    encoder = create_backbone("gabor").to(DEVICE)
    encoder.fit(batch.images.to(DEVICE) for batch in stream_batches(split.normals, SIZE, 8, 2))
    impl, matmul_precision = ENGINES.get(name, ("auto", "float32"))
    model = BGAD(encoder, SIZE, flow=config.flow, seed=seed, impl=impl, matmul_precision=matmul_precision).to(DEVICE)
    if name != PLAIN:
        return fast_engine(model, split, config)
    torch.manual_seed(seed)  # of the loop's own order of rows
    result = OfficialEngine(encoder, model, split, config).run()
    masks = torch.stack([stream.masks[0] for stream in stream_batches(split.test, SIZE, 1)])
    result.aupro = aupro(result.maps, masks)
    return result


def table(kept: dict[str, dict[str, float]]) -> str:
    """Markdown: of each contender the mean over textures, averaged over seeds, and its deviation over seeds."""
    lines = ["| | image AUROC | pixel AUROC | AUPRO | training and testing, s |", "|---|---|---|---|---|"]
    for name in (PLAIN, *ENGINES):
        runs = {key: kept[key] for c in CATEGORIES for s in SEEDS if (key := f"{name}/{c}/{s}") in kept}
        cells = []
        for metric in METRICS:
            seeds = [[runs[k][metric] for k in runs if k.endswith(f"/{seed}")] for seed in SEEDS]
            means = [statistics.fmean(values) for values in seeds if len(values) == len(CATEGORIES)]
            spread = f" ± {statistics.stdev(means):.4f}" if len(means) > 1 else ""
            cells.append(f"{statistics.fmean(means):.4f}{spread}" if means else "-")
        seconds = statistics.median(r["seconds"] for r in runs.values()) if runs else float("nan")
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    options = parser.parse_args()
    content = json.loads(FILE.read_text()) if FILE.exists() else {"runs": {}}
    kept: dict[str, dict[str, float]] = content["runs"]
    with tempfile.TemporaryDirectory() as folder:
        make_demo_dataset(Path(folder), seed=0)
        todo: list[tuple[str, str, int]] = [
            (name, c, s) for s in SEEDS for c in CATEGORIES for name in (PLAIN, *ENGINES) if options.only in name
        ]
        for name, category, seed in todo:
            key = f"{name}/{category}/{seed}"
            if key in kept:
                continue
            found = run(name, category, seed, Path(folder))
            kept[key] = {metric: float(getattr(found, metric)) for metric in METRICS} | {"seconds": found.seconds}
            print(key, kept[key], flush=True)
            # Another process may have added runs of its own.
            if FILE.exists():
                kept |= {k: v for k, v in json.loads(FILE.read_text())["runs"].items() if k not in kept}
            write_json(FILE, stamped({"runs": kept}))
    print(table(kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
