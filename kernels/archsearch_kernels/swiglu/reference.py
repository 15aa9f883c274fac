"""SwiGLU's elementwise part, silu(gate) * up (Shazeer, 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., F]."""
    return F.silu(gate) * up


def swiglu_packed(x: Tensor) -> Tensor:
    """silu(gate) * up of x [..., 2 F], which holds the gate and then what it gates: one projection makes both."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
