"""Feed-forward with two matrices: GELU (1606.08415) or squared ReLU (2109.08668)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """down(act(up(x))), x [B, T, D]; `relu2` is max(x, 0)^2."""

    def __init__(self, d_model: int, d_hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = activation
        self.up_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up_proj(x)
        h = F.gelu(h) if self.activation == "gelu" else F.relu(h).square()
        return self.down_proj(h)
