"""anomalib's Cflow, trained for a little and tested with anomalib's Engine, before and after one line.

    fastbgad demo --out runs/demo                                  # makes runs/demo/data, if you have no images yet
    python examples/anomalib_cflow.py --data runs/demo/data/brick

      model = Cflow(...)
    + fastbgad.accelerate(model)

Weights are random unless `--pretrained`, so that nothing is downloaded; scores are then poor, but they are the same.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from anomalib.data import Folder, MVTecAD
from anomalib.engine import Engine
from anomalib.models import Cflow
from lightning.pytorch import seed_everything

import fastbgad


def main() -> None:
    parser = argparse.ArgumentParser(description="anomalib's Cflow, before and after")
    parser.add_argument(
        "--data", type=Path, required=True, help="category in MVTec AD's layout, or normal/ anomalous/ masks/"
    )
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--pretrained", action="store_true", help="download the backbone's weights")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/anomalib_cflow"))
    options = parser.parse_args()

    seed_everything(0)
    folder = options.data.resolve()
    common = {"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
    if (folder / "normal").is_dir():
        parts = {"normal_dir": "normal", "abnormal_dir": "anomalous", "mask_dir": "masks"}
        datamodule = Folder(folder.name, root=folder, val_split_mode="same_as_test", **parts, **common)
    else:
        datamodule = MVTecAD(folder.parent, folder.name, **common)
    size = (options.image_size, options.image_size)
    model = Cflow(
        options.backbone,
        ("layer1", "layer2", "layer3"),
        pre_trained=options.pretrained,
        coupling_blocks=4,
        pre_processor=Cflow.configure_pre_processor(size),
    )
    fastbgad.accelerate(model)  # training is faster, too
    engine = Engine(max_epochs=1, default_root_dir=options.out, devices=1, limit_train_batches=8)
    engine.fit(model, datamodule=datamodule)

    images = torch.rand(4, 3, *size)
    accelerated, original = model.model.eval(), fastbgad.restore(copy.deepcopy(model.model)).eval()
    maps = []
    for name, inner in (("anomalib", original), ("accelerated", accelerated)):
        inner(images)
        started = time.perf_counter()
        maps.append(inner(images).anomaly_map)
        print(f"{name:>12}: {1e3 * (time.perf_counter() - started) / len(images):.0f} ms per image")
    print(f"largest difference of an anomaly map: {float((maps[0] - maps[1]).abs().max()):.1e}")
    engine.test(model, datamodule=datamodule)


if __name__ == "__main__":
    main()
