"""Rotary position embedding (Su et al., 2104.09864), in the half-split layout that transformers uses."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, position: int, theta: float, n_dims: int) -> Tensor:
    """Rotate the first `n_dims` features of x [B, T, H, D]; its tokens stand at position, position + 1, ..."""
    half = n_dims // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    at = torch.arange(position, position + x.shape[1], device=x.device, dtype=torch.float32)
    angle = (at[:, None] * frequency)[:, None]  # [T, 1, half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half:n_dims], x[..., n_dims:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
