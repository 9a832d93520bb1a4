"""The official BGAD training step, re-stated: its functions with boolean indices, and the loop that calls them by name.

`train_level` is handed the functions, as a module that imports them would be: `plain` below, or
`fastbgad.compat.bgad`. What the two do with the same decoder and the same rows must not differ.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, logsigmoid

from fastbgad import reference

CHUNK_ROWS, CONDITION_CHANNELS = 4096, 128
BETA, TAU, LAMBDA, NORMALIZER = 0.01, 0.1, 1.0, 10


def _get_logp(channels: int, z: Tensor, log_det: Tensor) -> Tensor:
    return -0.9189385332046727 * channels - 0.5 * (z**2).sum(1) + log_det


def _normal_weights(lp: Tensor) -> Tensor:
    u = lp / NORMALIZER
    weights = torch.ones_like(u)
    below = u <= -0.2
    weights[below] = 11.7 * (1 - torch.exp(u[below])) ** 0.5 * u[below].abs()
    return weights


def _anomalous_weights(lp: Tensor) -> Tensor:
    u = lp / NORMALIZER
    weights = torch.ones_like(u)
    above = u > -1
    weights[above] = 0.53 * (1 + torch.exp(u[above])) ** 2 / u[above].abs()
    return weights


def _boundary(lp: Tensor, mask: Tensor, beta: float, tau: float, normalizer: float) -> tuple[Tensor, Tensor]:
    normal = lp[mask == 0].detach()
    place = int(((mask == 0).sum() * beta).item())
    b_n = torch.sort(normal)[0][place] / normalizer
    return b_n, b_n - tau


def _spp_loss(lp: Tensor, mask: Tensor, edges: Any, normalizer: float, weights: Tensor) -> tuple[Tensor, Tensor]:
    u = lp / normalizer
    normal, anomalous = u[mask == 0], u[mask == 1]
    pulled, pushed = normal <= edges[0], anomalous >= edges[1]
    pull = (edges[0] - normal[pulled]) * weights[mask == 0][pulled]
    push = (anomalous[pushed] - edges[1]) * weights[mask == 1][pushed]
    return pull.mean(), push.mean()


def _encoding(channels: int, height: int, width: int) -> Tensor:
    return reference.positional_encoding(channels, height, width)  # float64, so that a float64 loop is exact


plain = SimpleNamespace(
    get_logp=_get_logp,
    normal_fl_weighting=_normal_weights,
    abnormal_fl_weighting=_anomalous_weights,
    get_logp_boundary=_boundary,
    calculate_bg_spp_loss=_spp_loss,
    positionalencoding2d=_encoding,
)


def patch_rows(maps: Tensor, encoding: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, C] and encodings [N, P] of all patches of maps [B, C, h, w], for an encoding [P, h, w]."""
    batch, channels = maps.shape[:2]
    repeated = encoding.to(maps).unsqueeze(0).repeat(batch, 1, 1, 1)
    return maps.permute(0, 2, 3, 1).reshape(-1, channels), repeated.permute(0, 2, 3, 1).reshape(-1, len(encoding))


def loss_terms(functions: Any, lp: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L_ml, the pull and the push of a chunk after the first meta epoch, with focal weights."""
    constant = lp.detach()
    weights = constant.new_zeros(constant.shape)
    normal_weights = functions.normal_fl_weighting(constant[mask == 0])
    weights[mask == 0] = normal_weights
    weights[mask == 1] = functions.abnormal_fl_weighting(constant[mask == 1])
    loss = (-logsigmoid(lp[mask == 0]) * normal_weights).mean()
    edges = functions.get_logp_boundary(lp, mask, BETA, TAU, NORMALIZER)
    pull, push = functions.calculate_bg_spp_loss(lp, mask, edges, NORMALIZER, weights=weights)
    return loss, pull, push


def train_level(
    functions: Any,
    decoder: Any,
    optimizer: torch.optim.Optimizer,
    maps: Tensor,  # [B, C, h, w]
    masks: Tensor,  # [B, 1, H, W], 0 and 1
    chunk_rows: int = CHUNK_ROWS,
) -> list[float]:
    """One level's steps on a batch after the first meta epoch, focal weights on; the losses."""
    channels, height, width = maps.shape[1:]
    labels = interpolate(masks, size=(height, width), mode="nearest").reshape(-1)
    rows, encoding = patch_rows(maps, functions.positionalencoding2d(CONDITION_CHANNELS, height, width))
    order = torch.randperm(len(rows))
    losses = []
    for start in range(0, len(rows) - chunk_rows + 1, chunk_rows):
        chosen = order[torch.arange(start, start + chunk_rows)]
        where, x, mask = encoding[chosen], rows[chosen], labels[chosen]
        z, log_det = decoder(x, [where])
        lp = functions.get_logp(channels, z, log_det) / channels
        loss, pull, push = loss_terms(functions, lp, mask)
        loss = loss + LAMBDA * (pull + push)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
