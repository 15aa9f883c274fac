"""RMSNorm of the residual stream, of heads and of branches, whatever the precision of weights and activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archsearch_kernels.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's, computed in float32; returned in x's precision, or autocast's on CUDA, to which readers would cast."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        lower = x.is_cuda and torch.is_autocast_enabled("cuda")
        return rms_norm(x, self.weight, self.eps, dtype=torch.get_autocast_dtype("cuda") if lower else None)
