"""`fastbgad predict --engine ray`, and what `fastbgad predict` says at its end."""

from __future__ import annotations

from collections.abc import Sequence

from ..predict.local import CSV_FILE
from ..predict.ray import open_ray_run, predict_with_ray
from ..render import console
from .parser import Predict

_SHOWN = 20


def predict_by_ray(command: Predict) -> int:
    """Carries out `fastbgad predict --engine ray`; returns its exit code."""
    ray_run = open_ray_run(
        command.model,
        command.images,
        command.out,
        maps=command.maps,
        resume=command.resume,
        shard_size=command.shard_size,
        batch_size=command.batch_size,
        workers=command.workers,
    )
    run = ray_run.run
    print(
        f"{run.count} images, {run.waiting_images} to score in {len(run.waiting)} of {len(run.parts)} shards",
        flush=True,
    )
    with console.image_bar("predict", run.waiting_images) as on_images:
        summary = predict_with_ray(
            ray_run,
            device=command.device,
            address=command.ray_address,
            ray_workers=command.ray_workers,
            gpus_per_worker=command.gpus_per_worker,
            on_images=on_images,
        )
    return print_outcome(command, summary.scored, summary.skipped, summary.failed, summary.messages)


def print_outcome(command: Predict, scored: int, skipped: int, failed: int, messages: Sequence[str]) -> int:
    """Says how many images were scored and which could not be read; returns the command's exit code."""
    there = f", {skipped} were there already" if skipped else ""
    print(f"scored {scored} images{there}: {command.out / CSV_FILE}")
    if not failed:
        return 0
    # A name that is not UTF-8 must not cost the list.
    shown = [message.encode(errors="backslashreplace").decode() for message in messages[:_SHOWN]]
    listed = "\n".join(f"  - {message}" for message in shown)
    more = f"\n  ... and {failed - len(shown)} more" if failed > len(shown) else ""
    print(f"{failed} images could not be read; their lines in the CSV say why:\n{listed}{more}")
    return 2
