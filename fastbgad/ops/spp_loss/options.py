"""Options of the loss, which travel through dispatcher, portable path and registered operators as one."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ...errors import check_choice
from ..boundary.dispatcher import check_boundary_options

MlForm = Literal["logsigmoid", "nll"]
Reduction = Literal["mean", "sum"]


class SppLossOptions(NamedTuple):
    """Options of `fastbgad.ops.spp_loss`, in the order of its registered operator."""

    beta: float
    tau: float
    lam: float
    normalizer: float
    ml_form: str  # MlForm; an operator's schema knows plain strings
    reduction: str  # Reduction
    focal: bool
    push: bool

    def check(self) -> None:
        """Raise `ConfigError` for a value out of its range."""
        check_choice("ml_form", self.ml_form, MlForm)
        check_choice("reduction", self.reduction, Reduction)
        check_boundary_options(self.beta, self.tau, self.normalizer)

    @property
    def of_terms(self) -> tuple[float, float, str, str, bool, bool]:
        """The options of the terms under a given boundary, which the backward takes."""
        return self.lam, self.normalizer, self.ml_form, self.reduction, self.focal, self.push

    @staticmethod
    def under_given_boundary(
        lam: float, normalizer: float, ml_form: str, reduction: str, focal: bool, push: bool
    ) -> SppLossOptions:
        """Return options without those of the boundary, from `of_terms`."""
        return SppLossOptions(float("nan"), float("nan"), lam, normalizer, ml_form, reduction, focal, push)
