"""RMSNorm (Zhang and Sennrich, 1910.07467), with the residual added before it or a gate around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) * weight over the last dimension, in fp32; weight [D] of any dtype; `dtype`: y's, by default x's."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), x.shape[-1:], None if weight is None else weight.to(wide), eps).to(dtype or x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of h = x + residual, returned as (y, h); h has the wider of both dtypes. `dtype`: y's, default x's."""
    h = x + residual
    return rms_norm(h, weight, eps, dtype=dtype or x.dtype), h


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "silu",
    norm_before_gate: bool = True,
    groups: int = 1,
) -> Tensor:
    """RMSNorm with a gate, computed in fp32, returned in x's dtype; x and gate [..., D], weight [D].

    `norm_before_gate`: norm(x) * act(gate), else norm(x * act(gate)). `activation`: silu or sigmoid. Each of `groups`
    equal parts of D has its own norm.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    g = gate.to(wide)
    a = F.silu(g) if activation == "silu" else g.sigmoid()
    z = x.to(wide) if norm_before_gate else x.to(wide) * a
    if groups > 1:
        z = torch.unflatten(z, -1, (groups, -1))
    y = F.rms_norm(z, z.shape[-1:], eps=eps)
    if groups > 1:
        y = y.flatten(-2)
    y = y if weight is None else y * weight.to(wide)
    return (y * a if norm_before_gate else y).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension, computed in fp32; x [..., D]. `dtype`: by default x's."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    return (z * torch.rsqrt((z * z).sum(-1, keepdim=True) + eps)).to(dtype or x.dtype)
