"""The explicit boundary as the official BGAD code computes it.

Source: Yao et al., CVPR 2023, "explicit boundary generating".
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from ...errors import FeatureError
from ...ops import boundary
from ...ops.boundary.dispatcher import check_boundary_options
from ...ops.debug import debugging
from ...ops.dispatch import check_mask_rows

# Rows up to which the two roundings of the boundary's index are compared; that takes 20 ms at most, once.
_MOST_ROWS_COMPARED = 2**20


def get_logp_boundary(
    logps: Tensor, mask: Tensor, pos_beta: float = 0.05, margin_tau: float = 0.1, normalizer: float = 10
) -> tuple[Tensor, Tensor]:
    """Return the boundary b_n, the int(n_normal * pos_beta)-th smallest normal log-likelihood, and b_n - margin_tau.

    The official code rounds the product n_normal * pos_beta to float32; where that changes the row chosen
    (pos_beta 0.29 and 100 normal rows), this function does the same.

    Args:
        logps: [N] log-likelihoods per dimension; detached here.
        mask: [N], 0 for normal and 1 for anomalous rows, of any type.
        pos_beta: percentile as a fraction, 0 <= pos_beta < 1.
        margin_tau: distance of the two boundaries, in units of logps / normalizer.
        normalizer: what logps is divided by.

    Returns:
        b_n and b_a, scalar tensors of the type of logps, in units of logps / normalizer. Without a normal row both are
        NaN, so no row violates them; the official code stops with an IndexError, which takes a synchronization with a
        GPU.

    Raises:
        ConfigError: pos_beta outside [0, 1), a negative margin_tau, a normalizer that is not positive.
        FeatureError: shapes or devices that do not fit. On the CPU and inside `fastbgad.ops.debug_checks` also NaN,
            and a mask with values besides 0 and 1; elsewhere NaN counts as larger than everything.

    Source: Yao et al., CVPR 2023, "explicit boundary generating".
    """
    check_mask_rows(logps, mask)
    check_boundary_options(pos_beta, margin_tau, normalizer)
    lp, anomalous = logps.detach(), mask != 0
    on_host = lp.device.type == "cpu" and not torch.compiler.is_compiling()
    # The values of a GPU's tensors would take a synchronization.
    if on_host or debugging():
        _check_values(lp, mask, anomalous)
    if on_host:
        b_n = _smallest_normal(lp[~anomalous], pos_beta) / normalizer
    elif _same_index(float(pos_beta), len(lp)):
        b_n = boundary(lp, anomalous, beta=pos_beta, tau=margin_tau, normalizer=normalizer).b_n.to(lp.dtype)
    else:
        b_n = _smallest_normal_on_device(lp, anomalous, pos_beta) / normalizer
    return b_n, b_n - margin_tau


def _check_values(lp: Tensor, mask: Tensor, anomalous: Tensor) -> None:
    if len(lp) and math.isnan(float(lp.max())):
        raise FeatureError(
            f"{int(torch.isnan(lp).sum())} of {len(lp)} log-likelihoods are NaN; a boundary needs numbers: "
            "leave those rows out, or look for NaN in the features"
        )
    if mask.dtype != torch.bool and not torch.equal(mask, anomalous.to(mask.dtype)):
        raise FeatureError("the mask has values besides 0 (normal) and 1 (anomalous); binarize it")


def _smallest_normal(normal: Tensor, beta: float) -> Tensor:
    """Return the int(n * beta)-th smallest of n values on the CPU, none of them NaN; NaN if there is no value."""
    if len(normal) == 0:
        return normal.new_full((), torch.nan)
    index = int(np.float32(len(normal)) * np.float32(beta))
    return torch.kthvalue(normal, min(index, len(normal) - 1) + 1).values


def _smallest_normal_on_device(lp: Tensor, anomalous: Tensor, beta: float) -> Tensor:
    """Return the same of the normal rows of [N], without synchronizing with the device."""
    if len(lp) == 0:
        return lp.new_full((), torch.nan)
    n_normal = len(lp) - anomalous.sum()
    last = (n_normal - 1).clamp(min=0)
    index = torch.minimum((n_normal.float() * beta).long(), last)
    # NaN is sorted last: anomalous rows come after all normal ones, and without a normal row the result is NaN.
    return torch.sort(torch.where(anomalous, torch.nan, lp)).values.gather(0, index.reshape(1))[0]


@functools.lru_cache(maxsize=256)
def _same_index(beta: float, rows: int) -> bool:
    """Return True if int(n * beta) is the same with a product in float32 and in float64, for every n up to rows."""
    if rows > _MOST_ROWS_COMPARED:
        return False
    n = np.arange(rows + 1)
    product = n.astype(np.float32) * np.float32(beta)
    return np.array_equal(product.astype(np.int64), (n * beta).astype(np.int64))
