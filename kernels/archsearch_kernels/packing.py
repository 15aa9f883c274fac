"""Packed documents: `seq_idx` [B, T] numbers them, `cu_seqlens` [N + 1] lists where they begin and end."""

from __future__ import annotations

import torch
from torch import Tensor


def seq_idx_of(cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    """Document numbers [1, T] int32 of one row of `n_tokens`, from the running lengths [N + 1] (0 first).

    Nothing is copied to the host. Raises ValueError if `cu_seqlens` is not a vector of integers.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; expected integers [N + 1]")
    at = torch.arange(n_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, at, right=True, out_int32=True)[None] - 1
