"""Hard permutations of channels: a matrix W_perm of zeros and ones, or the index that FrEIA's main branch stores."""

from __future__ import annotations

import torch
from torch import Tensor


def permutation_matrix(index: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W [C, C] with (W v)[i] = v[index[i]], from an integer index [C]; FrEIA computes x[:, index]."""
    return torch.nn.functional.one_hot(index.detach().long(), len(index)).to(dtype)


def is_permutation_matrix(w: Tensor) -> bool:
    """Return whether a matrix [C, C] moves whole channels and does nothing else."""
    ones = w == 1
    return bool((ones | (w == 0)).all() and (ones.sum(0) == 1).all() and (ones.sum(1) == 1).all())
