"""Rotary position embedding (Su et al., 2104.09864), in the half-split layout that transformers uses."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, position: int | Tensor, theta: float, n_dims: int) -> Tensor:
    """Rotate the first `n_dims` features of x [B, T, H, D]; its tokens stand at position, position + 1, ...

    A tensor `position` [B] (or of one number) of integers gives every sequence its own start. The sines are those of
    the fp32 product of position and frequency.
    """
    half = n_dims // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    if isinstance(position, Tensor):
        at = (position.reshape(-1, 1) + torch.arange(x.shape[1], device=x.device)).to(torch.float32)  # [B or 1, T]
    else:
        at = torch.arange(position, position + x.shape[1], device=x.device, dtype=torch.float32)
    angle = (at[..., None] * frequency)[..., None, :]  # [T, 1, half], or that for every sequence
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half:n_dims], x[..., n_dims:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rope_qk(q: Tensor, k: Tensor, position: int | Tensor, theta: float, n_dims: int) -> tuple[Tensor, Tensor]:
    """`rope` of q [B, T, HQ, D] and k [B, T, HK, D], which stand at the same positions."""
    return rope(q, position, theta, n_dims), rope(k, position, theta, n_dims)
