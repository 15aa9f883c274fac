"""Rotary position embedding (Su et al., 2104.09864), in the half-split layout that transformers uses."""

from __future__ import annotations

from torch import Tensor

from archsearch_kernels.rope import rope


def apply_rope(x: Tensor, position: int, theta: float, n_dims: int) -> Tensor:
    """Rotate the first `n_dims` features of x [B, T, H, D]; its tokens stand at position, position + 1, ..."""
    return rope(x, position, theta, n_dims)
