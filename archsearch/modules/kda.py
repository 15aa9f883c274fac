"""Kimi delta attention: the delta rule with a decay per key feature (Kimi Linear, 2510.26692)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.modules.decay import reset_decay
from archsearch_kernels.kda import kda, projected_kda_step
from archsearch_kernels.rms_norm import gated_rms_norm, l2_norm
from archsearch_kernels.short_conv import short_conv, short_conv_step


class KDA(nn.Module):
    """Short convolution and SiLU on q, k, v; unit q and k; KDA; RMSNorm of every head times sigmoid(W_b W_a x).

    Decay (`f`) and output gate (`g`) come from projections of rank head_k_dim and head_v_dim.
    """

    def __init__(self, d_model: int, n_heads: int, head_k_dim: int, head_v_dim: int, conv: int = 4) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.head_k_dim = head_k_dim
        self.head_v_dim = head_v_dim
        self.conv = conv
        self.d_key = n_heads * head_k_dim
        self.d_value = n_heads * head_v_dim
        self.qkv_proj = nn.Linear(d_model, 2 * self.d_key + self.d_value, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2 * self.d_key + self.d_value, conv))
        self.beta_proj = nn.Linear(d_model, n_heads, bias=False)
        self.f_a_proj = nn.Linear(d_model, head_k_dim, bias=False)
        self.f_b_proj = nn.Linear(head_k_dim, self.d_key, bias=False)
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.d_key))
        self.g_a_proj = nn.Linear(d_model, head_v_dim, bias=False)
        self.g_b_proj = nn.Linear(head_v_dim, self.d_value, bias=False)
        self.norm = nn.RMSNorm(head_v_dim, eps=1e-6)
        self.o_proj = nn.Linear(self.d_value, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Taps as a depthwise nn.Conv1d has them, decays as in Mamba-2."""
        nn.init.uniform_(self.conv_weight, -(self.conv**-0.5), self.conv**-0.5)
        reset_decay(self.dt_bias, self.A_log)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        qkv, _ = short_conv(self.qkv_proj(x), self.conv_weight, silu=True, seq_idx=seq_idx)
        o, _ = kda(*self._operands(qkv, x), seq_idx=seq_idx)
        return self._output(o, x)

    def _heads(self, qkv: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As projected: q, k of any length and decays [B, T, H, K], v [B, T, H, V], steps [B, T, H]."""
        q, k, v = torch.split(qkv, [self.d_key, self.d_key, self.d_value], dim=-1)
        decay = self.f_b_proj(self.f_a_proj(x))
        q, k, v, decay = (z.reshape(*z.shape[:2], self.n_heads, -1) for z in (q, k, v, decay))
        return q, k, v, self.beta_proj(x), decay

    def _operands(self, qkv: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Unit q and k, v, steps and log decays."""
        q, k, v, beta, decay = self._heads(qkv, x)
        dt = F.softplus(decay.float() + self.dt_bias.float().view(decay.shape[-2:]))
        return l2_norm(q), l2_norm(k), v, beta.float().sigmoid(), -self.A_log.float().exp()[:, None] * dt

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        gate = self.g_b_proj(self.g_a_proj(x)).view_as(o)
        return self.o_proj(gated_rms_norm(o, gate, self.norm.weight, activation="sigmoid").flatten(-2))

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        shape = (batch, self.n_heads, self.head_k_dim, self.head_v_dim)
        return {
            "conv": torch.zeros(batch, self.conv - 1, 2 * self.d_key + self.d_value, device=device, dtype=dtype),
            "s": torch.zeros(shape, device=device, dtype=torch.float32),
        }

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        qkv, taps = short_conv(self.qkv_proj(x), self.conv_weight, silu=True, state=state["conv"])
        o, s = kda(*self._operands(qkv, x), initial_state=state["s"])
        state["conv"].copy_(taps)
        state["s"].copy_(s)
        return self._output(o, x)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        qkv, _ = short_conv_step(self.qkv_proj(x), self.conv_weight, None, state["conv"], silu=True, inplace=True)
        q, k, v, beta, decay = (z[:, 0] for z in self._heads(qkv, x))
        o, _ = projected_kda_step(q, k, v, beta, decay, self.A_log, self.dt_bias, state["s"], inplace=True)
        return self._output(o[:, None], x)
