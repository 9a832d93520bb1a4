"""The explicit boundary: a percentile of the normal log-likelihoods (Yao et al., CVPR 2023)."""

from __future__ import annotations

import torch
from torch import Tensor


def boundary(
    lp: Tensor,  # [N], log-likelihood per dimension
    anomalous: Tensor,  # [N] bool
    beta: float,
    tau: float,
    normalizer: float,
) -> tuple[Tensor, Tensor]:
    """Return b_n and b_a, detached scalars in units of lp / normalizer.

        b_n = sorted(lp of normals)[int(n_normal * beta)] / normalizer,        b_a = b_n - tau

    Without a normal row there is no boundary: both are NaN.
    """
    normal = torch.sort(lp.detach()[~anomalous]).values
    if len(normal) == 0:
        nothing = lp.new_full((), float("nan"))
        return nothing, nothing
    b_n = normal[int(len(normal) * beta)] / normalizer
    return b_n, b_n - tau
