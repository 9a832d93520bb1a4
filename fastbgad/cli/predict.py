"""`fastbgad predict`: score images, in this process or with `--engine ray` by many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..model.detector import BGAD
from ..predict.local import CSV_FILE, MapFormat, find_images, predict_files
from ..predict.ray import open_ray_run, predict_with_ray
from ..render import console
from ..system.environment import choose_device
from ..wording import bullets


@dataclass(frozen=True)
class Predict:
    """Score images with a trained model: a CSV line and an anomaly map per image, streamed.

    fastbgad predict --model runs/screw/model.safetensors --out scores photos/ 'more/**/*.png'

    fastbgad predict --engine ray --model runs/screw/model.safetensors --out scores --maps none archive/

    Folders are searched for files with the suffix of an image; links are followed. A file that is named itself is tried
    whatever its name.

    --engine ray spreads millions of images over processes, GPUs and machines. The images are divided into shards. The
    scores of each are one file in OUT/shards, written atomically; at the end all are joined into scores.csv.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively, but for hidden names) or quoted globs; a note names what is not read."""
    model: Path
    """A model.safetensors that train wrote."""
    out: Path
    """Folder for scores.csv and maps/; its own maps are not scored."""
    maps: MapFormat = "overlay"
    """overlay: heat over the image (PNG); png16: raw map, 16 bits, scale in maps.json; npy: raw float32; none."""
    resume: bool = False
    """Keep an existing scores.csv and score only the images it lacks; with --engine ray keep finished shards."""
    batch_size: int = 8
    """Images that go through the model together."""
    bit_depth: int | None = None
    """Significant bits of images that are stored in 16, such as 12; if left out, as the model was trained."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 2
    """Threads that decode images and write maps; with --engine ray of every Ray worker."""
    engine: Literal["local", "ray"] = "local"
    """local: this process; ray: Ray Data, on this machine or a cluster (needs fastbgad[ray])."""
    shard_size: int = 1000
    """Images per shard, for --engine ray."""
    ray_address: str | None = None
    """Cluster for --engine ray: auto, or host:port; without it Ray runs on this machine during the call."""
    ray_workers: int | None = None
    """Processes with a model each, for --engine ray; if left out, one per GPU, or per CPU core without a GPU."""
    gpus_per_worker: float = 1.0
    """GPUs of every Ray worker; with 0.5 two workers share one."""

    def run(self) -> int:
        """Score the images; return the exit code, 2 if some could not be read."""
        return self._run_by_ray() if self.engine == "ray" else self._run_here()

    def _run_here(self) -> int:
        model = BGAD.load(self.model, device=choose_device(self.device))
        images = find_images(self.images, leave_out=self.out)
        with console.image_bar("predict", len(images)) as on_images:
            summary = predict_files(
                model,
                images,
                self.out,
                maps=self.maps,
                resume=self.resume,
                batch_size=self.batch_size,
                workers=self.workers,
                bit_depth=self.bit_depth,
                on_images=on_images,
            )
        return self._print_outcome(summary.scored, summary.skipped, len(summary.failed), summary.failed)

    def _run_by_ray(self) -> int:
        ray_run = open_ray_run(
            self.model,
            self.images,
            self.out,
            maps=self.maps,
            resume=self.resume,
            shard_size=self.shard_size,
            batch_size=self.batch_size,
            workers=self.workers,
            bit_depth=self.bit_depth,
        )
        run = ray_run.run
        print(
            f"{run.count} images, {run.waiting_images} to score in {len(run.waiting)} of {len(run.parts)} shards",
            flush=True,
        )
        with console.image_bar("predict", run.waiting_images) as on_images:
            summary = predict_with_ray(
                ray_run,
                device=self.device,
                address=self.ray_address,
                ray_workers=self.ray_workers,
                gpus_per_worker=self.gpus_per_worker,
                on_images=on_images,
            )
        return self._print_outcome(summary.scored, summary.skipped, summary.failed, summary.messages)

    def _print_outcome(self, scored: int, skipped: int, failed: int, messages: Sequence[str]) -> int:
        """Print how many images were scored and which could not be read; return the exit code."""
        there = f", {skipped} were there already" if skipped else ""
        print(f"scored {scored} images{there}: {self.out / CSV_FILE}")
        if not failed:
            return 0
        # A name that is not UTF-8 must not cost the list.
        printable = [message.encode(errors="backslashreplace").decode() for message in messages]
        print(f"{failed} images could not be read; their lines in the CSV say why:\n{bullets(printable, total=failed)}")
        return 2
