"""LFM2's gated short convolution (Liquid AI, 2511.23404): the cheapest mixer, blind beyond a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archsearch_kernels.short_conv import short_conv, short_conv_step


class ShortConv(nn.Module):
    """o_proj(c * conv(b * x)) with b, c, x = in_proj(x); the convolution is depthwise over `kernel` tokens."""

    def __init__(self, d_model: int, kernel: int = 3) -> None:
        super().__init__()
        self.d_model = d_model
        self.kernel = kernel
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(d_model, kernel))
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.conv_weight, -(self.kernel**-0.5), self.kernel**-0.5)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        b, c, u = self.in_proj(x).chunk(3, dim=-1)
        y, _ = short_conv(b * u, self.conv_weight, seq_idx=seq_idx)
        return self.o_proj(c * y)

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"conv": torch.zeros(batch, self.kernel - 1, self.d_model, device=device, dtype=dtype)}

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        b, c, u = self.in_proj(x).chunk(3, dim=-1)
        y, taps = short_conv(b * u, self.conv_weight, state=state["conv"])
        state["conv"] = taps.clone()
        return self.o_proj(c * y)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        b, c, u = self.in_proj(x).chunk(3, dim=-1)
        y, _ = short_conv_step(b * u, self.conv_weight, None, state["conv"], inplace=True)
        return self.o_proj(c * y)
