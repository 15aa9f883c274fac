"""Mamba-2's block: state space duality with one decay per head and a gated norm (Dao and Gu, 2405.21060)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from archsearch.modules.decay import reset_decay
from archsearch_kernels.rms_norm import gated_rms_norm
from archsearch_kernels.scalar_decay import scalar_decay, ssd_operands, ssd_step
from archsearch_kernels.short_conv import short_conv, short_conv_step


class Mamba2(nn.Module):
    """o_proj(norm((SSD(conv(x, B, C), dt) + D x) * silu(z))): linear attention with k = B, q = C and v = dt x.

    `n_groups` sets of B and C serve all heads; the norm (after the gate) works within each group.
    """

    def __init__(
        self, d_model: int, n_heads: int, head_dim: int, d_state: int, n_groups: int = 1, conv: int = 4
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.d_state = d_state
        self.n_groups = n_groups
        self.conv = conv
        self.d_inner = n_heads * head_dim
        self.d_conv = self.d_inner + 2 * n_groups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + self.d_conv + n_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.d_conv, conv))
        self.conv_bias = nn.Parameter(torch.empty(self.d_conv))
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.empty(n_heads))
        self.norm_weight = nn.Parameter(torch.empty(self.d_inner))
        self.o_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Step sizes log-uniform in [1e-3, 1e-1], decay rates log-uniform in [1, 16]."""
        nn.init.uniform_(self.conv_weight, -(self.conv**-0.5), self.conv**-0.5)
        nn.init.zeros_(self.conv_bias)
        reset_decay(self.dt_bias)
        nn.init.uniform_(self.A_log, math.log(1.0), math.log(16.0))
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm_weight)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        z, xBC, dt = self._project(x)
        xBC, _ = short_conv(xBC, self.conv_weight, self.conv_bias, silu=True, seq_idx=seq_idx)
        u, B, C = self._heads(xBC)
        v, g = ssd_operands(u, dt, self.A_log, self.dt_bias)
        y, _ = scalar_decay(C, B, v, g, scale=1.0, seq_idx=seq_idx)
        return self._output(self._skip(y, u), z)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, xBC, dt = torch.split(self.in_proj(x), [self.d_inner, self.d_conv, self.n_heads], dim=-1)
        return z, xBC, dt

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs u [B, T, H, P], B and C [B, T, G, N]."""
        states = self.n_groups * self.d_state
        u, B, C = torch.split(xBC, [self.d_inner, states, states], dim=-1)
        B, C = (z.reshape(*z.shape[:2], self.n_groups, self.d_state) for z in (B, C))
        return u.reshape(*u.shape[:2], self.n_heads, self.head_dim), B, C

    def _skip(self, y: Tensor, u: Tensor) -> Tensor:
        return torch.addcmul(y, self.D.to(u.dtype)[:, None], u)

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        y = gated_rms_norm(y.flatten(-2), z, self.norm_weight, norm_before_gate=False, groups=self.n_groups)
        return self.o_proj(y)

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        shape = (batch, self.n_heads, self.d_state, self.head_dim)
        return {
            "conv": torch.zeros(batch, self.conv - 1, self.d_conv, device=device, dtype=dtype),
            "s": torch.zeros(shape, device=device, dtype=torch.float32),
        }

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        z, xBC, dt = self._project(x)
        xBC, taps = short_conv(xBC, self.conv_weight, self.conv_bias, silu=True, state=state["conv"])
        u, B, C = self._heads(xBC)
        v, g = ssd_operands(u, dt, self.A_log, self.dt_bias)
        y, s = scalar_decay(C, B, v, g, scale=1.0, initial_state=state["s"])
        state["conv"].copy_(taps)
        state["s"].copy_(s)
        return self._output(self._skip(y, u), z)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        z, xBC, dt = self._project(x)
        xBC, _ = short_conv_step(xBC, self.conv_weight, self.conv_bias, state["conv"], silu=True, inplace=True)
        u, B, C, dt = (t[:, 0] for t in (*self._heads(xBC), dt))
        y, _ = ssd_step(C, B, u, dt, self.A_log, self.dt_bias, self.D, state["s"], inplace=True)
        return self._output(y[:, None], z)
