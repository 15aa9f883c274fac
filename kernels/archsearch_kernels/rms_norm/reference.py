"""RMSNorm (Zhang and Sennrich, 1910.07467), with the residual added before it or a gate around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / rms(x) * weight over the last dimension, computed in fp32; x [..., C], weight [C] of any dtype.

    With `residual` [..., C]: the norm of h = x + residual, returned as (y, h); h has the wider of both dtypes.
    `dtype`: that of y, by default x's.
    """
    h = x if residual is None else x + residual
    wide = torch.promote_types(h.dtype, torch.float32)
    y = F.rms_norm(h.to(wide), h.shape[-1:], None if weight is None else weight.to(wide), eps).to(dtype or x.dtype)
    return y if residual is None else (y, h)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "silu",
    norm_before_gate: bool = True,
    groups: int = 1,
) -> Tensor:
    """norm(x) * act(gate), or norm(x * act(gate)) without `norm_before_gate`; in fp32, returned in x's dtype.

    x and gate [..., C], weight [C]; act is `silu` or `sigmoid`. Each of `groups` equal parts of C has its own norm.
    The first form is that of gated linear attention and Qwen3-Next, the second that of Mamba-2.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    g = gate.to(wide)
    a = F.silu(g) if activation == "silu" else g.sigmoid()
    z = x.to(wide) if norm_before_gate else x.to(wide) * a
    parts = z.view(*z.shape[:-1], groups, z.shape[-1] // groups)
    y = F.rms_norm(parts, parts.shape[-1:], eps=eps).flatten(-2)
    y = y if weight is None else y * weight.to(wide)
    return (y * a if norm_before_gate else y).to(x.dtype)
