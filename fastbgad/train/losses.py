"""The loss each method trains with, in each phase."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LossConfig, Method
from ..ops import Impl, contrastive_loss, spp_loss
from ..reference import SppLoss


def training_loss(
    lp: Tensor,  # [N]
    anomalous: Tensor,  # [N] bool
    channels: int,
    method: Method,
    config: LossConfig,
    *,
    first_phase: bool,
    impl: Impl = "auto",
) -> SppLoss:
    """Return the loss of one chunk of rows.

    - First phase, and NFAD throughout: L_ml alone, without focal weights in the first phase as in the official code.
    - BGAD w/o: L_ml + lambda L_n. BGAD: L_ml + lambda (L_n + L_a).
    - BGAD-dagger: L_ml + lambda (pull + push) of the conventional contrastive loss, with tau as its margin.

    The official code leaves out L_n in chunks that happen to hold no anomalous row; the paper's equation does not,
    nor does this.

    Returns:
        `SppLoss`; its boundaries and its counts of violating rows are computed in every phase, so that training shows
        them from the start.
    """
    plain = first_phase or method == "nfad"
    loss = spp_loss(
        lp,
        anomalous,
        channels,
        beta=config.beta,
        tau=config.tau,
        normalizer=config.normalizer,
        lam=0.0 if plain or method == "bgad_dagger" else config.lam,
        ml_form=config.ml_form,
        reduction=config.reduction,
        focal=config.focal and not first_phase,
        push=method == "bgad",
        impl=impl,
    )
    if plain:
        zero = torch.zeros_like(loss.ml.detach())
        return loss._replace(total=loss.ml, normal=zero, anomalous=zero)
    if method == "bgad_dagger":
        pull, push = contrastive_loss(lp / config.normalizer, anomalous, config.tau, impl=impl)
        return loss._replace(total=loss.ml + config.lam * (pull + push), normal=pull, anomalous=push)
    return loss
