"""Mamba's block: a gated selective state space behind a short convolution (Gu and Dao, 2312.00752)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.modules.decay import reset_decay
from archsearch.modules.norm import RMSNorm
from archsearch_kernels.selective_scan import selective_scan, selective_scan_step
from archsearch_kernels.short_conv import short_conv, short_conv_step


class Mamba(nn.Module):
    """o_proj((S6(u) + D u) * silu(z)) with u the convolved input; only B, C and the low-rank dt mix channels.

    `inner_norm` norms dt, B and C, as Jamba does to keep its activations from growing (2403.19887).
    """

    def __init__(
        self, d_model: int, d_inner: int, d_state: int, dt_rank: int, conv: int, inner_norm: bool = False
    ) -> None:
        super().__init__()
        self.d_inner = d_inner
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.conv = conv
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(d_inner, conv))
        self.conv_bias = nn.Parameter(torch.empty(d_inner))
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(d_inner))
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.o_proj = nn.Linear(d_inner, d_model, bias=False)
        self.inner_norm = inner_norm
        if inner_norm:
            self.dt_norm = RMSNorm(dt_rank, eps=1e-6)
            self.B_norm = RMSNorm(d_state, eps=1e-6)
            self.C_norm = RMSNorm(d_state, eps=1e-6)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Step sizes log-uniform in [1e-3, 1e-1], decay rates 1 to N in every channel (S4D-real)."""
        nn.init.uniform_(self.conv_weight, -(self.conv**-0.5), self.conv**-0.5)
        nn.init.zeros_(self.conv_bias)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        reset_decay(self.dt_bias)
        if not self.A_log.is_meta:  # see reset_decay
            rates = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=torch.float32)
            self.A_log.copy_(rates.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # [B, T, I]
        u, _ = short_conv(u, self.conv_weight, self.conv_bias, silu=True, seq_idx=seq_idx)
        y, _ = selective_scan(u, *self._selection(u), seq_idx=seq_idx)
        return self._output(y, u, z)

    def _selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step sizes [B, T, I], rates [I, N], and where to write and read, [B, T, N], as the tokens choose them."""
        dt, B, C = torch.split(self.x_proj(u), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.inner_norm:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt = F.softplus(self.dt_proj(dt).float() + self.dt_bias.float())
        return dt, -self.A_log.float().exp(), B, C

    def _output(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        return self.o_proj(torch.addcmul(y, self.D.to(u.dtype), u) * F.silu(z))

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "conv": torch.zeros(batch, self.conv - 1, self.d_inner, device=device, dtype=dtype),
            "s": torch.zeros(batch, self.d_state, self.d_inner, device=device, dtype=torch.float32),
        }

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, taps = short_conv(u, self.conv_weight, self.conv_bias, silu=True, state=state["conv"])
        y, s = selective_scan(u, *self._selection(u), initial_state=state["s"])
        state["conv"].copy_(taps)
        state["s"].copy_(s)
        return self._output(y, u, z)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, _ = short_conv_step(u, self.conv_weight, self.conv_bias, state["conv"], silu=True, inplace=True)
        dt, A, B, C = self._selection(u)
        y, _ = selective_scan_step(u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state["s"], inplace=True)
        return self._output(y[:, None], u, z)
