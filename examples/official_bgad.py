"""The official BGAD training loop with two changes: its import lines, and `accelerate` for its FrEIA decoders.

    fastbgad demo --out runs/demo                                  # makes runs/demo/data, if you have no images yet
    python examples/official_bgad.py --data runs/demo/data/brick

In the official repository (https://github.com/xcyao00/BGAD) the changes are, in engines/bgad_fas_train_engine.py:

    - from models import ...          # load_flow_model, positionalencoding2d
    - from losses import ...          # get_logp_boundary, calculate_bg_spp_loss, the focal weightings
    - from utils import ...           # get_logp, convert_to_anomaly_scores, save_weights
    + from fastbgad.compat.bgad import ...      # the same names, see below

Its `load_flow_model` then needs no FrEIA. Decoders of FrEIA's own become as fast with one more line (`--freia` here):

    + decoders = [fastbgad.accelerate(decoder) for decoder in decoders]

Everything between, as below, stays as it is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import interpolate, logsigmoid

import fastbgad
from fastbgad.compat.bgad import (
    abnormal_fl_weighting,
    calculate_bg_spp_loss,
    convert_to_anomaly_scores,
    get_logp,
    get_logp_boundary,
    load_flow_model,
    normal_fl_weighting,
    positionalencoding2d,
    save_weights,
)
from fastbgad.data import stream_batches

ROWS = 4096


def subnet(inputs: int, outputs: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, 2 * inputs), torch.nn.ReLU(), torch.nn.Linear(2 * inputs, outputs)
    )


def freia_decoder(args: SimpleNamespace, channels: int) -> torch.nn.Module:
    """A decoder as the official code makes it."""
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    flow = Ff.SequenceINN(channels)
    for _ in range(args.coupling_layers):
        flow.append(
            Fm.AllInOneBlock,
            cond=0,
            cond_shape=(args.pos_embed_dim,),
            subnet_constructor=subnet,
            affine_clamping=args.clamp_alpha,
            global_affine_type="SOFTPLUS",
            permute_soft=True,
        )
    return fastbgad.accelerate(flow)


def rows_of(maps: torch.Tensor, args: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, C] and their condition [N, P], put in order as the official loop does it."""
    batch, channels, height, width = maps.shape
    encoding = positionalencoding2d(args.pos_embed_dim, height, width).to(maps.device).unsqueeze(0)
    encoding = encoding.repeat(batch, 1, 1, 1).permute(0, 2, 3, 1).reshape(-1, args.pos_embed_dim)
    return maps.permute(0, 2, 3, 1).reshape(-1, channels), encoding


def train_level(decoder, optimizer, maps, masks, first_epoch: bool, args: SimpleNamespace) -> float:
    x, encoding = rows_of(maps, args)
    labels = interpolate(masks, size=maps.shape[2:], mode="nearest").reshape(-1)
    order = torch.randperm(len(x))
    total = 0.0
    for chosen in order.split(ROWS):
        mask = labels[chosen]
        z, log_det = decoder(x[chosen], [encoding[chosen]])
        lp = get_logp(maps.shape[1], z, log_det) / maps.shape[1]
        if first_epoch or not mask.any():
            loss = -logsigmoid(lp[mask == 0]).mean()
        else:
            weights = torch.where(mask == 0, normal_fl_weighting(lp.detach()), abnormal_fl_weighting(lp.detach()))
            loss = (-logsigmoid(lp[mask == 0]) * weights[mask == 0]).mean()
            edges = get_logp_boundary(lp, mask, args.pos_beta, args.margin_tau, args.normalizer)
            terms = calculate_bg_spp_loss(lp, mask, edges, args.normalizer, weights=weights, empty="zero")
            loss = loss + args.bgspp_lambda * sum(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(chosen)
    return total / len(order)


def main() -> None:
    parser = argparse.ArgumentParser(description="the official BGAD loop on fastbgad's functions")
    parser.add_argument("--data", type=Path, required=True, help="folder of a category, see `fastbgad train --help`")
    parser.add_argument("--backbone", default="gabor", help="gabor, or a timm model such as tf_efficientnet_b6.aa_in1k")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training images")
    parser.add_argument("--image-size", type=int, default=192)
    parser.add_argument("--anomalies", type=int, default=10, help="how many labelled anomalies to learn from")
    parser.add_argument("--freia", action="store_true", help="decoders of FrEIA's, accelerated")
    parser.add_argument("--out", type=Path, default=Path("runs/official"))
    options = parser.parse_args()

    args = SimpleNamespace(
        flow_arch="conditional_flow_model",
        coupling_layers=8,
        clamp_alpha=1.9,
        pos_embed_dim=128,
        pos_beta=0.05,
        margin_tau=0.1,
        normalizer=10,
        bgspp_lambda=1.0,
        img_size=2 * (options.image_size,),
    )
    torch.manual_seed(0)
    category = fastbgad.open_category(options.data)
    split = fastbgad.split_known_anomalies(category, options.anomalies)
    encoder = fastbgad.create_backbone(options.backbone)
    if encoder.needs_fit:
        encoder.fit(batch.images for batch in stream_batches(split.normals, args.img_size, 16))
    args.feature_levels = len(encoder.channels)
    make = freia_decoder if options.freia else load_flow_model
    decoders = [make(args, channels) for channels in encoder.channels]
    optimizer = torch.optim.Adam([p for decoder in decoders for p in decoder.parameters()], lr=1e-3)

    for epoch in range(options.epochs):
        started, losses = time.perf_counter(), []
        samples = list(split.normals) if epoch == 0 else [*split.normals, *split.known_anomalies]
        mixed = [samples[i] for i in torch.randperm(len(samples)).tolist()]
        for batch in stream_batches(mixed, args.img_size, 16):
            with torch.no_grad():
                features = encoder(batch.images)
            for decoder, maps in zip(decoders, features, strict=True):
                losses.append(train_level(decoder, optimizer, maps, batch.masks[:, None].float(), epoch == 0, args))
        print(f"epoch {epoch}: loss {np.mean(losses):.4f}, {time.perf_counter() - started:.1f} s")

    logps: list[list[torch.Tensor]] = [[] for _ in decoders]
    labels = np.array([sample.label for sample in split.test])
    masks = []
    with torch.no_grad():
        for batch in stream_batches(split.test, args.img_size, 16):
            masks.append(batch.masks)
            for level, (decoder, maps) in enumerate(zip(decoders, encoder(batch.images), strict=True)):
                x, encoding = rows_of(maps, args)
                lp = get_logp(maps.shape[1], *decoder(x, [encoding])) / maps.shape[1]
                logps[level].append(lp.reshape(len(maps), *maps.shape[2:]))
    scores = convert_to_anomaly_scores(args, logps)
    image_auroc = fastbgad.auroc(scores.max(axis=(1, 2)), labels)
    print(f"image AUROC {image_auroc:.3f}, AUPRO {fastbgad.aupro(scores, torch.cat(masks).numpy()):.3f}")
    save_weights(encoder, decoders, str(options.out), "bgad", category.name)
    print(f"weights: {options.out / 'bgad' / 'weights' / category.name}.pt")


if __name__ == "__main__":
    main()
