"""The door to the explicit boundary. Oracle: `fastbgad.reference.boundary`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..errors import ConfigError
from .dispatch import Impl, check_mask, resolve_impl


class Boundary(NamedTuple):
    """The explicit boundary in units of lp / normalizer, on lp's device."""

    b_n: Tensor  # scalar; NaN where there is no normal row
    b_a: Tensor  # scalar, b_n - tau
    n_normal: Tensor  # scalar int64, how many rows it rests on


def boundary(
    lp: Tensor,  # [N]
    anomalous: Tensor,  # [N] bool
    *,
    beta: float = 0.01,
    tau: float = 0.1,
    normalizer: float = 10.0,
    impl: Impl = "auto",
) -> Boundary:
    """The int(n_normal * beta)-th smallest normal log-likelihood, without waiting for the device.

    Args:
        lp: [N] log-likelihood per dimension; detached here.
        anomalous: [N] bool.
        beta: percentile as a fraction, 0 <= beta < 1.
        tau: margin between b_n and b_a, in units of lp / normalizer.
        normalizer: what lp is divided by.
        impl: "auto", "torch" or "reference".

    Returns:
        `Boundary(b_n, b_a, n_normal)`; without a normal row both boundaries are NaN, and every comparison with them
        is false, so a loss built on them has no violating row.

    Raises:
        ConfigError: beta outside [0, 1), negative tau, normalizer not positive.
        FeatureError: lp and mask do not fit.

    Source: Yao et al., CVPR 2023, "explicit boundary generating".
    """
    kind = resolve_impl(impl)
    check_mask(lp, anomalous)
    check_boundary_options(beta, tau, normalizer)
    n_normal = (~anomalous).sum()
    if kind == "reference":
        return Boundary(*reference.boundary(lp, anomalous, beta, tau, normalizer), n_normal)
    # Anomalous rows move behind all normal ones, so the normal order statistic keeps its place.
    behind = torch.where(anomalous, torch.inf, lp.detach())
    if len(lp) == 0:
        nothing = lp.new_full((), float("nan"))
        return Boundary(nothing, nothing, n_normal)
    place = (n_normal.double() * beta).long()
    value = torch.sort(behind).values.gather(0, place.reshape(1))[0]
    b_n = torch.where(n_normal > 0, value / normalizer, torch.nan)
    return Boundary(b_n, b_n - tau, n_normal)


def check_boundary_options(beta: float, tau: float, normalizer: float) -> None:
    """Raises `ConfigError` for values that cannot define a boundary."""
    if not 0 <= beta < 1:
        raise ConfigError(f"beta is {beta}; it is a fraction, 0 <= beta < 1 (0.01 takes the first percentile)")
    if tau < 0:
        raise ConfigError(f"tau is {tau}; the margin cannot be negative")
    if not normalizer > 0:
        raise ConfigError(f"normalizer is {normalizer}; it must be positive")
