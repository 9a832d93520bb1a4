"""The factor that keeps gradients inside the range of float16 while the flow's kernels carry them back."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_scale(*gradients: Tensor | None) -> Tensor:
    """S = 2^k, [1], that brings the largest of these float32 gradients to between 1/2 and 1; found on their device.

    Without it a mean over many rows would vanish in float16, and a loss that AMP has scaled would overflow. Most of the
    range is left above, a factor of 65504, for gradients that grow on their way back: one that overflows spoils a whole
    step. Below, digits go slowly, from a 16384th of the largest on.

    A power of two changes no digit, and |k| <= 120 keeps S and 1 / S normal numbers. Zeros alone, nothing at all, or an
    infinite or NaN gradient give 1.
    """
    given = [gradient for gradient in gradients if gradient is not None]
    largest = [gradient.abs().amax() for gradient in given if gradient.numel()]
    if not largest:
        return torch.ones(1, device=given[0].device)
    most = torch.stack(largest).amax().reshape(1)
    # most = m 2^e with m in [1/2, 1). Put together from its bits: exp2 may round even where its result is exact.
    power = -torch.frexp(most).exponent.clamp(-120, 120)
    return torch.where((most > 0) & most.isfinite(), ((power + 127) << 23).view(torch.float32), 1.0)
