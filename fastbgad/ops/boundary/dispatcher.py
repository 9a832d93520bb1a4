"""Dispatcher of the explicit boundary. Reference: `fastbgad.reference.boundary`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ... import reference
from ...errors import ConfigError
from ..dispatch import Impl, check_mask, compute_dtype, resolve_impl
from .pooled import pooled_boundary_torch, pooled_boundary_triton
from .portable import portable_boundary
from .registered import boundary_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Boundary(NamedTuple):
    """The explicit boundary in units of lp / normalizer, on lp's device."""

    b_n: Tensor  # scalar; NaN where there is no normal row
    b_a: Tensor  # scalar, b_n - tau
    n_normal: Tensor  # scalar int64, number of normal rows


def boundary(
    lp: Tensor,  # [N]
    anomalous: Tensor,  # [N] bool
    *,
    beta: float = 0.01,
    tau: float = 0.1,
    normalizer: float = 10.0,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
) -> Boundary:
    """Return the int(n_normal * beta)-th smallest normal log-likelihood, without waiting for the device.

    Args:
        lp: [N] log-likelihood per dimension; detached here. float16 and bfloat16 are cast up to float32.
        anomalous: [N] bool.
        beta: percentile as a fraction, 0 <= beta < 1.
        tau: margin between b_n and b_a, in units of lp / normalizer.
        normalizer: divisor of lp.
        impl: "auto", "triton", "torch" or "reference".
        group: pool the normal rows of these processes: all get the boundary of all their rows, bit for bit that of
            one process holding them all. Every process of the group calls this, with its own rows (any number of
            them) and the same options, implementation and type. None uses the rows given here alone. A pooled
            boundary is not one registered operation, so torch.compile(fullgraph=True) does not take it.

    Returns:
        `Boundary(b_n, b_a, n_normal)`. Without a normal row n_normal is 0 and both boundaries are NaN; every
        comparison with them is false, so a loss built on them has no violating row. They are also NaN where the
        chosen row itself is NaN: NaN counts as larger than everything, as in `torch.sort`.

    Raises:
        ConfigError: beta outside [0, 1), negative tau, normalizer not positive, a group with "reference" or one that
            this process does not belong to.
        FeatureError: lp and mask do not fit.
        BackendError: "triton" for tensors that the kernels cannot take here.

    Source: Yao et al., CVPR 2023, "explicit boundary generating".
    """
    kind = resolve_impl(impl, lp)
    check_mask(lp, anomalous)
    check_boundary_options(beta, tau, normalizer)
    lp = lp.detach().to(compute_dtype(lp))
    if kind == "reference":
        if group is not None:
            raise ConfigError('the reference takes no process group; pool the boundary with impl="torch" or "triton"')
        return Boundary(*reference.boundary(lp, anomalous, beta, tau, normalizer), (~anomalous).sum())
    if group is not None:
        pooled = pooled_boundary_triton if kind == "triton" else pooled_boundary_torch
        return Boundary(*pooled(lp, anomalous, beta, tau, normalizer, group))
    if kind == "triton":
        return Boundary(*boundary_op(lp, anomalous, beta, tau, normalizer))
    return Boundary(*portable_boundary(lp, anomalous, beta, tau, normalizer))


def check_boundary_options(beta: float, tau: float, normalizer: float) -> None:
    """Raise `ConfigError` for values that cannot define a boundary."""
    if not 0 <= beta < 1:
        raise ConfigError(f"beta is {beta}; it is a fraction, 0 <= beta < 1 (0.01 takes the first percentile)")
    if tau < 0:
        raise ConfigError(f"tau is {tau}; the margin cannot be negative")
    if not normalizer > 0:
        raise ConfigError(f"normalizer is {normalizer}; it must be positive")
