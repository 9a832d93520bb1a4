"""Configurations that the kernels ship in, one module per operation.

Each module of `MODULES` has `variants()`, which the ahead-of-time gate compiles, and `tuning_cases()` where tile sizes
are a choice. Importing this package imports neither a kernel nor Triton.
"""

from .variant import TuningCase, Variant

MODULES = ("log_likelihood", "boundary", "spp_loss", "score_map", "flow", "coupling")

__all__ = ["MODULES", "TuningCase", "Variant"]
