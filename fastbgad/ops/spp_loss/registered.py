"""The loss as the registered operations `fastbgad::spp_loss` and `fastbgad::spp_loss_backward`.

torch.compile and torch.export see each as one node. The forward includes the boundary unless one is passed in (the
boundary pooled over processes, which an operation cannot compute because it takes no process group).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import interpreting

Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fastbgad::spp_loss", mutates_args=(), device_types="cuda")
def spp_loss_op(
    lp: Tensor,  # [N] float32
    anomalous: Tensor,  # [N] bool
    channels: int,
    beta: float,
    tau: float,
    lam: float,
    normalizer: float,
    ml_form: str,
    reduction: str,
    focal: bool,
    push: bool,
    b_n: Tensor | None = None,  # scalar; with b_a: take these instead of the boundary of these rows
    b_a: Tensor | None = None,  # scalar
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total, ml, normal, anomalous, b_n, b_a (float32 scalars); rows under L_ml, L_n and L_a (int64 scalars)."""
    return _launch(lp, anomalous, channels, beta, tau, lam, normalizer, ml_form, reduction, focal, push, b_n, b_a)


@spp_loss_op.register_kernel("cpu")
def _(
    lp: Tensor, anomalous: Tensor, channels: int, beta: float, tau: float, lam: float, normalizer: float,
    ml_form: str, reduction: str, focal: bool, push: bool, b_n: Tensor | None = None, b_a: Tensor | None = None,
) -> Nine:  # fmt: skip
    """A graph traced for a GPU also runs here: by the interpreter if it is on, else by the portable path."""
    if interpreting():
        return _launch(lp, anomalous, channels, beta, tau, lam, normalizer, ml_form, reduction, focal, push, b_n, b_a)
    from ..boundary.dispatcher import portable_boundary
    from .dispatcher import portable_spp_loss  # the doors import this file

    if b_n is None or b_a is None:
        b_n, b_a, _ = portable_boundary(lp, anomalous, beta, tau, normalizer)
    terms, n_normal = portable_spp_loss(
        lp, anomalous, channels, b_n, b_a, lam, normalizer, ml_form, reduction, focal, push
    )  # fmt: skip
    # clone: the outputs of an operation are no aliases of its inputs.
    return (
        terms.total, terms.ml, terms.normal, terms.anomalous, b_n.clone(), b_a.clone(), n_normal,
        terms.normal_violations, terms.anomalous_violations,
    )  # fmt: skip


@spp_loss_op.register_fake
def _(
    lp: Tensor, anomalous: Tensor, channels: int, beta: float, tau: float, lam: float, normalizer: float,
    ml_form: str, reduction: str, focal: bool, push: bool, b_n: Tensor | None = None, b_a: Tensor | None = None,
) -> Nine:  # fmt: skip
    total, ml, normal, term, edge_n, edge_a = (lp.new_empty(()) for _ in range(6))
    n_normal, pulled, pushed = (lp.new_empty((), dtype=torch.int64) for _ in range(3))
    return total, ml, normal, term, edge_n, edge_a, n_normal, pulled, pushed


@torch.library.custom_op("fastbgad::spp_loss_backward", mutates_args=(), device_types="cuda")
def spp_loss_backward_op(
    lp: Tensor,  # [N] float32
    anomalous: Tensor,  # [N] bool
    channels: int,
    b_n: Tensor,
    b_a: Tensor,
    n_normal: Tensor,
    normal_violations: Tensor,
    anomalous_violations: Tensor,
    g_total: Tensor | None,  # upstream gradients, float32 scalars; None counts as 0
    g_ml: Tensor | None,
    g_normal: Tensor | None,
    g_anomalous: Tensor | None,
    lam: float,
    normalizer: float,
    ml_form: str,
    reduction: str,
    focal: bool,
    push: bool,
) -> Tensor:
    """d_lp [N]."""
    return _launch_backward(
        lp, anomalous, channels, (b_n, b_a, n_normal, normal_violations, anomalous_violations),
        (g_total, g_ml, g_normal, g_anomalous), lam, normalizer, ml_form, reduction, focal, push,
    )  # fmt: skip


@spp_loss_backward_op.register_kernel("cpu")
def _(
    lp: Tensor, anomalous: Tensor, channels: int, b_n: Tensor, b_a: Tensor, n_normal: Tensor,
    normal_violations: Tensor, anomalous_violations: Tensor, g_total: Tensor | None, g_ml: Tensor | None,
    g_normal: Tensor | None, g_anomalous: Tensor | None, lam: float, normalizer: float, ml_form: str, reduction: str,
    focal: bool, push: bool,
) -> Tensor:  # fmt: skip
    upstream = (g_total, g_ml, g_normal, g_anomalous)
    if interpreting():
        return _launch_backward(
            lp, anomalous, channels, (b_n, b_a, n_normal, normal_violations, anomalous_violations), upstream,
            lam, normalizer, ml_form, reduction, focal, push,
        )  # fmt: skip
    from .dispatcher import portable_spp_loss_backward  # the door imports this file

    return portable_spp_loss_backward(
        lp, anomalous, channels, (b_n, b_a, n_normal, normal_violations, anomalous_violations), upstream,
        lam, normalizer, ml_form, reduction, focal, push,
    )  # fmt: skip


@spp_loss_backward_op.register_fake
def _(lp: Tensor, *_: Any) -> Tensor:
    return lp.new_empty(lp.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Nine) -> None:
    lp, anomalous, channels, _, _, lam, normalizer, *options = inputs
    ctx.save_for_backward(lp, anomalous, *output[4:])
    ctx.options = (lam, normalizer, *options[:4])
    ctx.channels = channels
    ctx.mark_non_differentiable(*output[4:])
    # A term that is not used has no gradient, rather than zeros made by a launch of their own.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    lp, anomalous, *scalars = ctx.saved_tensors
    d_lp = None
    if any(g is not None for g in upstream[:4]):
        d_lp = spp_loss_backward_op(lp, anomalous, ctx.channels, *scalars, *upstream[:4], *ctx.options)
    return (d_lp, *[None] * 12)


spp_loss_op.register_autograd(_backward, setup_context=_keep)


def _launch(
    lp: Tensor, anomalous: Tensor, channels: int, beta: float, tau: float, lam: float, normalizer: float,
    ml_form: str, reduction: str, focal: bool, push: bool, b_n: Tensor | None, b_a: Tensor | None,
) -> Nine:  # fmt: skip
    from ...kernels.spp_loss import spp_loss_forward  # triton need not be installed

    # Clones: the outputs of an operation are no aliases of its inputs.
    edges = None if b_n is None or b_a is None else (b_n.clone(), b_a.clone())
    with torch.cuda.device_of(lp):
        return spp_loss_forward(
            lp.contiguous(), anomalous.contiguous(), channels, beta=beta, tau=tau, lam=lam, normalizer=normalizer,
            nll=ml_form == "nll", mean=reduction == "mean", focal=focal, push=push, edges=edges,
        )  # fmt: skip


def _launch_backward(
    lp: Tensor, anomalous: Tensor, channels: int, scalars: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    lam: float, normalizer: float, ml_form: str, reduction: str, focal: bool, push: bool,
) -> Tensor:  # fmt: skip
    from ...kernels.spp_loss import spp_loss_backward  # triton need not be installed

    with torch.cuda.device_of(lp):
        return spp_loss_backward(
            lp.contiguous(), anomalous.contiguous(), channels, scalars, upstream, lam=lam, normalizer=normalizer,
            nll=ml_form == "nll", mean=reduction == "mean", focal=focal, push=push,
        )  # fmt: skip
