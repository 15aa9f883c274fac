"""SwiGLU feed-forward (Shazeer, 2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn

from archsearch_kernels.swiglu import swiglu


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), x [B, T, D]."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.up_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return y
