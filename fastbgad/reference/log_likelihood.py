"""The log-likelihood of a patch feature, per dimension (Yao et al., CVPR 2023, "estimating log-likelihoods")."""

from __future__ import annotations

import math

from torch import Tensor


def log_likelihood(
    z: Tensor,  # [N, C]
    log_det: Tensor,  # [N]
) -> Tensor:
    """Return lp [N], in nats per dimension.

        log p(x) = -C/2 ln(2 pi) - 1/2 z^T z + log|det J|,        lp = log p(x) / C

    The division by C is the official code's: it makes the levels, which differ in C, comparable.
    """
    channels = z.shape[1]
    return (-channels / 2 * math.log(2 * math.pi) - 0.5 * (z * z).sum(dim=1) + log_det) / channels
