"""Choice of an operation's implementation, and checks that all dispatchers share.

`impl` is "auto", "torch" (the portable fast path), "native" (the same with the flow in compiled C++, on a CPU),
"triton" (the kernels, on a GPU) or "reference" (slow and obvious). An explicit choice never falls back silently: it
runs or it raises `BackendError`. "auto" takes the kernels for CUDA tensors they support, compiled C++ for the flows it
serves if there is a compiler, and the portable path everywhere else.
"""

from __future__ import annotations

import os
import warnings
from typing import Literal

import torch
from torch import Tensor

from ..errors import BackendError, FeatureError, check_choice
from ..kernels.triton_version import triton_version, why_not_this_triton

Impl = Literal["auto", "torch", "native", "triton", "reference"]
# The type of the operands of matrix products; sums and everything else are float32. "auto" is float16 in the kernels
# and float32 elsewhere. The kernels take float16 or float32; on a CPU float16 means float32 too, and bfloat16 is for
# the subnets' products of a training step.
MatmulPrecision = Literal["auto", "float16", "float32", "bfloat16"]
Precision = MatmulPrecision  # its former name
OperandPrecision = Literal["float16", "float32", "bfloat16"]  # without "auto"

# Why no kernel can run here, None if Triton is installed in a version they can use. Determined once, when this module
# is imported: to torch.compile it is a constant.
TRITON_OBSTACLE = why_not_this_triton(triton_version())

# The kernels' matrix products need the 16-bit tensor cores of Ampere and later.
SMALLEST_CAPABILITY = (8, 0)


def resolve_impl(impl: Impl, like: Tensor) -> Literal["torch", "triton", "reference"]:
    """Return the implementation that will run on tensors of `like`'s device and type.

    "native" concerns the flow only: every other operation takes "torch" for it. See `ops.flow.choice`.

    Raises:
        ConfigError: an unknown name.
        BackendError: "triton" for tensors that the kernels cannot take here.
    """
    check_impl(impl)
    if impl == "auto":
        return "triton" if like.device.type == "cuda" and why_not_triton(like) is None else "torch"
    if impl == "triton":
        obstacle = why_not_triton(like)
        if obstacle is not None:
            raise BackendError(f'impl="triton": {obstacle}; use impl="torch" or "auto"')
    return "torch" if impl == "native" else impl


def check_impl(impl: str) -> None:
    """Raise `ConfigError` for an unknown implementation."""
    check_choice("impl", impl, Impl)


def check_matmul_precision(matmul_precision: str) -> None:
    """Raise `ConfigError` for an unknown type of operands."""
    check_choice("matmul_precision", matmul_precision, MatmulPrecision)


def resolve_matmul_precision(matmul_precision: MatmulPrecision) -> OperandPrecision:
    """Return the type of the kernels' operands; files store it in place of "auto"."""
    return "float16" if matmul_precision == "auto" else matmul_precision


def renamed_precision(matmul_precision: MatmulPrecision, precision: MatmulPrecision | None) -> MatmulPrecision:
    """Return the matmul precision that a caller chose, and warn where it was given by its former name, `precision`."""
    if precision is None:
        return matmul_precision
    if not torch.compiler.is_compiling():
        warnings.warn("the option precision is now called matmul_precision", DeprecationWarning, stacklevel=3)
    return precision


def why_not_triton(like: Tensor) -> str | None:
    """Return why the kernels cannot run on tensors like this one, or None."""
    if TRITON_OBSTACLE is not None:
        return TRITON_OBSTACLE
    if like.dtype == torch.float64:
        return "the kernels compute in float32, these tensors are float64"
    if like.device.type == "cuda":
        capability = torch.cuda.get_device_capability(like.device)
        if capability < SMALLEST_CAPABILITY:
            return f"this GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
        return None
    if like.device.type == "cpu" and interpreting():
        return None
    return f"the kernels run on CUDA tensors, these are on {like.device.type}"


def interpreting() -> bool:
    """Return whether Triton's interpreter runs kernels on CPU tensors: TRITON_INTERPRET=1, for tests of the kernels.

    Read from the environment, as Triton does: torch.compile cannot trace Triton's own switch.
    """
    asked = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    return asked and TRITON_OBSTACLE is None


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of the arithmetic: float64 for float64 input, float32 for anything narrower."""
    if not x.is_floating_point():
        raise FeatureError(f"features must be floating point, not {x.dtype}")
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_mask(lp: Tensor, anomalous: Tensor) -> None:
    """Raise `FeatureError` unless `anomalous` is a bool tensor of lp's one-dimensional shape, on lp's device."""
    check_mask_rows(lp, anomalous)
    if anomalous.dtype != torch.bool:
        raise FeatureError(f"the mask must be bool (True: anomalous), not {anomalous.dtype}")


def check_mask_rows(lp: Tensor, mask: Tensor) -> None:
    """Raise `FeatureError` unless a mask of any type has lp's one-dimensional shape and lies on lp's device."""
    if lp.dim() != 1 or mask.shape != lp.shape:
        raise FeatureError(f"log-likelihoods and mask must both be [N], not {tuple(lp.shape)} and {tuple(mask.shape)}")
    if mask.device != lp.device:
        raise FeatureError(f"log-likelihoods are on {lp.device} but the mask is on {mask.device}")
