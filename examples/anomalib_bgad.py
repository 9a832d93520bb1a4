"""Trains BGAD with anomalib's Engine and exports it three times: for PyTorch, as ONNX, and for fastbgad's command line.

    fastbgad demo --out runs/demo                                  # makes runs/demo/data, if you have no images yet
    python examples/anomalib_bgad.py --data runs/demo/data/brick

The folder is a category in the layout of MVTec AD, or a plain one with `normal/`, `anomalous/` and `masks/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anomalib.data import AnomalibDataModule, Folder, MVTecAD
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from lightning.pytorch import seed_everything

from fastbgad.compat.anomalib import Bgad, with_known_anomalies


def open_folder(folder: Path, batch_size: int, seed: int) -> AnomalibDataModule:
    common = {"train_batch_size": batch_size, "eval_batch_size": batch_size, "num_workers": 2, "seed": seed}
    if (folder / "normal").is_dir():
        parts = {"normal_dir": "normal", "abnormal_dir": "anomalous", "mask_dir": "masks"}
        return Folder(folder.name, root=folder, val_split_mode="same_as_test", **parts, **common)
    return MVTecAD(folder.parent, folder.name, **common)


def main() -> None:
    parser = argparse.ArgumentParser(description="BGAD in anomalib")
    parser.add_argument("--data", type=Path, required=True, help="folder of a category")
    parser.add_argument("--backbone", default="gabor", help="gabor, or a timm model such as tf_efficientnet_b6.aa_in1k")
    parser.add_argument("--epochs", type=int, default=8, help="the paper trains for 200")
    parser.add_argument("--image-size", type=int, default=192, help="images are made square")
    parser.add_argument("--anomalies", type=int, default=10, help="how many labelled anomalies to learn from")
    parser.add_argument("--out", type=Path, default=Path("runs/anomalib"))
    options = parser.parse_args()

    seed_everything(0)
    images = open_folder(options.data.resolve(), batch_size=8, seed=0)
    datamodule = with_known_anomalies(images, options.anomalies, repeat=1)
    # Settings of fastbgad's demo: a short schedule with a high learning rate, for textures.
    model = Bgad(
        options.backbone,
        coupling_layers=4,
        lr=1e-3,
        lr_floor=1e-2,
        meta_epochs=4,
        warmup_epochs=1,
        cut_paste=4,
        cell_labels="any",
        pre_processor=Bgad.configure_pre_processor((options.image_size, options.image_size)),
    )
    engine = Engine(max_epochs=options.epochs, default_root_dir=options.out, devices=1)
    engine.train(model, datamodule=datamodule)

    print("for PyTorch:", engine.export(model, ExportType.TORCH))
    print("for ONNX runtimes:", engine.export(model, ExportType.ONNX))
    model.to_fastbgad().save(options.out / "model.safetensors")
    print("for fastbgad evaluate and predict:", options.out / "model.safetensors")


if __name__ == "__main__":
    main()
