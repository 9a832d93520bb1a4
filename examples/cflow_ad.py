"""CFLOW-AD's test loop with two changes, timed before and after: `accelerate`, and one import line.

    fastbgad demo --out runs/demo                                  # makes runs/demo/data, if you have no images yet
    python examples/cflow_ad.py --data runs/demo/data/brick

In the repository of CFLOW-AD (https://github.com/gudovskiy/cflow-ad) the changes are, in train.py:

    - from model import ..., positionalencoding2d
    + from model import ...
    + from fastbgad.compat.bgad import positionalencoding2d
    + import fastbgad

      decoders = ...                  # as before
    + decoders = [fastbgad.accelerate(decoder) for decoder in decoders]

Weights are random here, so that nothing is downloaded: what counts is that the maps are the same, and the time.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import timm
import torch

import fastbgad
from fastbgad.compat.bgad import get_logp, positionalencoding2d
from fastbgad.data import stream_batches

CONDITION, FIBERS = 128, 256


def subnet(inputs: int, outputs: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, 2 * inputs), torch.nn.ReLU(), torch.nn.Linear(2 * inputs, outputs)
    )


def freia_decoder(channels: int) -> torch.nn.Module:
    """A decoder as CFLOW-AD makes it."""
    flow = Ff.SequenceINN(channels)
    for _ in range(8):
        flow.append(
            Fm.AllInOneBlock,
            cond=0,
            cond_shape=(CONDITION,),
            subnet_constructor=subnet,
            affine_clamping=1.9,
            global_affine_type="SOFTPLUS",
            permute_soft=True,
        )
    return flow.eval()


@torch.no_grad()
def log_likelihoods(decoders: list, features: list, encoding_of: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """lp of every patch of every level, a fiber batch at a time, as CFLOW-AD's test loop computes it."""
    found = []
    for decoder, maps in zip(decoders, features, strict=True):
        batch, channels, height, width = maps.shape
        area = height * width
        encoding = encoding_of(CONDITION, height, width).unsqueeze(0).repeat(batch, 1, 1, 1)
        c_r = encoding.reshape(batch, CONDITION, area).transpose(1, 2).reshape(batch * area, CONDITION)
        e_r = maps.reshape(batch, channels, area).transpose(1, 2).reshape(batch * area, channels)
        parts = []
        for rows in torch.arange(batch * area).split(FIBERS):
            parts.append(get_logp(channels, *decoder(e_r[rows], [c_r[rows]])) / channels)
        found.append(torch.cat(parts))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="CFLOW-AD's test loop, before and after")
    parser.add_argument("--data", type=Path, required=True, help="folder of a category, see `fastbgad train --help`")
    parser.add_argument("--backbone", default="resnet18", help="any timm model with feature maps")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--images", type=int, default=8, help="how many test images to use")
    options = parser.parse_args()

    torch.manual_seed(0)
    samples = fastbgad.open_category(options.data).test[: options.images]
    encoder = timm.create_model(options.backbone, features_only=True, out_indices=(2, 3, 4)).eval()
    before = [freia_decoder(channels) for channels in encoder.feature_info.channels()]
    after = [fastbgad.accelerate(copy.deepcopy(decoder)) for decoder in before]
    seconds, difference = [0.0, 0.0], 0.0
    for batch in stream_batches(samples, 2 * (options.image_size,), 1):
        with torch.no_grad():
            features = encoder(batch.images.float() / 255)
        results = []
        ways = ((before, lambda *size: positionalencoding2d(*size) + 0), (after, positionalencoding2d))
        for way, (decoders, encoding_of) in enumerate(ways):  # + 0: an ordinary tensor
            started = time.perf_counter()
            results.append(log_likelihoods(decoders, features, encoding_of))
            seconds[way] += time.perf_counter() - started
        for lp, expected in zip(results[1], results[0], strict=True):
            difference = max(difference, float((lp - expected).abs().max()))
    for name, total in zip(("FrEIA", "accelerated"), seconds, strict=True):
        print(f"{name:>12}: {1e3 * total / len(samples):.0f} ms per image for the flows")
    print(f"largest difference of a log-likelihood: {difference:.1e}")


if __name__ == "__main__":
    main()
