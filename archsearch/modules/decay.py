"""How decays and their step sizes start, as in Mamba-2 (Dao and Gu, 2405.21060)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def reset_decay(dt_bias: Tensor, A_log: Tensor | None = None) -> None:
    """Steps softplus(dt_bias) log-uniform in [1e-3, 1e-1], rates e^{A_log} uniform in [1, 16]."""
    if dt_bias.is_meta:  # nothing to fill, and arithmetic on meta would import torch._dynamo (seconds)
        return
    if A_log is not None:
        A_log.uniform_(1, 16).log_()
    dt = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
