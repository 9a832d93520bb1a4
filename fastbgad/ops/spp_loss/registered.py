"""The loss as the registered operators `fastbgad::spp_loss` and `fastbgad::spp_loss_backward`.

The forward includes the boundary unless one is passed in (the boundary pooled over processes, which an operator cannot
compute because it takes no process group). Operators take the options one by one; everything else takes them as one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..boundary.portable import portable_boundary
from ..registration import register
from .options import SppLossOptions
from .portable import Statistics, Upstream, portable_spp_loss, portable_spp_loss_backward

Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _launch(
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
    """Return total, ml, normal, anomalous, b_n, b_a (float32) and rows under L_ml, L_n and L_a (int64), scalars."""
    from ...kernels.spp_loss import spp_loss_forward  # triton need not be installed

    # Clones: the outputs of an operator are no aliases of its inputs.
    edges = None if b_n is None or b_a is None else (b_n.clone(), b_a.clone())
    options = SppLossOptions(beta, tau, lam, normalizer, ml_form, reduction, focal, push)
    with torch.cuda.device_of(lp):
        return spp_loss_forward(
            lp.contiguous(), anomalous.contiguous(), channels, beta=beta, tau=tau, **_of_kernels(options), edges=edges
        )


def _portable(lp: Tensor, anomalous: Tensor, channels: int, *arguments: Any) -> Nine:
    options, (b_n, b_a) = _split(*arguments)
    if b_n is None or b_a is None:
        b_n, b_a, _ = portable_boundary(lp, anomalous, options.beta, options.tau, options.normalizer)
    terms, n_normal = portable_spp_loss(lp, anomalous, channels, b_n, b_a, options)
    scalars = terms._replace(b_n=b_n.clone(), b_a=b_a.clone())
    return (*scalars[:6], n_normal, *scalars[6:])


def _split(*arguments: Any) -> tuple[SppLossOptions, tuple[Tensor | None, Tensor | None]]:
    """Return the options and a boundary; PyTorch leaves out trailing arguments that have their default."""
    count = len(SppLossOptions._fields)
    b_n, b_a = (*arguments[count:], None, None)[:2]
    return SppLossOptions(*arguments[:count]), (b_n, b_a)


def _fake(lp: Tensor, *_: Any) -> Nine:
    total, ml, normal, term, b_n, b_a = (lp.new_empty(()) for _ in range(6))
    n_normal, pulled, pushed = (lp.new_empty((), dtype=torch.int64) for _ in range(3))
    return total, ml, normal, term, b_n, b_a, n_normal, pulled, pushed


def _launch_backward(
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
    """Return d_lp [N]."""
    from ...kernels.spp_loss import spp_loss_backward  # triton need not be installed

    statistics = Statistics(b_n, b_a, n_normal, normal_violations, anomalous_violations)
    options = SppLossOptions.under_given_boundary(lam, normalizer, ml_form, reduction, focal, push)
    with torch.cuda.device_of(lp):
        return spp_loss_backward(
            lp.contiguous(),
            anomalous.contiguous(),
            channels,
            statistics,
            (g_total, g_ml, g_normal, g_anomalous),
            **_of_kernels(options),
        )


def _portable_backward(lp: Tensor, anomalous: Tensor, channels: int, *arguments: Any) -> Tensor:
    statistics, (g_total, g_ml, g_normal, g_anomalous) = Statistics(*arguments[:5]), arguments[5:9]
    upstream: Upstream = g_total, g_ml, g_normal, g_anomalous
    options = SppLossOptions.under_given_boundary(*arguments[9:])
    return portable_spp_loss_backward(lp, anomalous, channels, statistics, upstream, options)


def _fake_backward(lp: Tensor, *_: Any) -> Tensor:
    return lp.new_empty(lp.shape)


def _of_kernels(options: SppLossOptions) -> dict[str, Any]:
    """Return the options of the terms as the kernels' launchers take them."""
    return {
        "lam": options.lam,
        "normalizer": options.normalizer,
        "nll": options.ml_form == "nll",
        "mean": options.reduction == "mean",
        "focal": options.focal,
        "push": options.push,
    }


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Nine) -> None:
    lp, anomalous, channels, *arguments = inputs
    ctx.save_for_backward(lp, anomalous, *output[4:])
    ctx.options, ctx.channels = _split(*arguments)[0].of_terms, channels
    ctx.mark_non_differentiable(*output[4:])
    # A term that is not used has no gradient, rather than zeros made by a launch of their own.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    lp, anomalous, *statistics = ctx.saved_tensors
    d_lp = None
    if any(g is not None for g in upstream[:4]):
        d_lp = spp_loss_backward_op(lp, anomalous, ctx.channels, *statistics, *upstream[:4], *ctx.options)
    return (d_lp, *[None] * 12)


spp_loss_op: Any = register(
    "spp_loss", _launch, portable=_portable, fake=_fake, setup_context=_setup_context, backward=_backward
)
spp_loss_backward_op: Any = register(
    "spp_loss_backward", _launch_backward, portable=_portable_backward, fake=_fake_backward
)
