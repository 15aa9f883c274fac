"""Gated DeltaNet: the delta rule with a decay per head (Yang et al., 2412.06464), as Qwen3-Next has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.modules.decay import reset_decay
from archsearch_kernels.delta_rule import delta_rule, projected_delta_rule_step
from archsearch_kernels.rms_norm import gated_rms_norm, l2_norm
from archsearch_kernels.short_conv import short_conv, short_conv_step


class GatedDeltaNet(nn.Module):
    """Short convolution and SiLU on q, k, v; unit q and k; gated delta rule; RMSNorm of every head times SiLU(W x).

    Each query/key head serves n_v_heads / n_k_heads neighbouring value heads, with steps and decays of their own.
    `neg_eigenvalues`: steps in (0, 2) in place of (0, 1) (2411.12537).
    """

    def __init__(
        self,
        d_model: int,
        n_k_heads: int,
        n_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        conv: int = 4,
        neg_eigenvalues: bool = False,
    ) -> None:
        super().__init__()
        self.n_v_heads = n_v_heads
        self.head_k_dim = head_k_dim
        self.head_v_dim = head_v_dim
        self.conv = conv
        self.max_beta = 2.0 if neg_eigenvalues else 1.0
        self.d_key = n_k_heads * head_k_dim
        self.d_value = n_v_heads * head_v_dim
        self.qkv_proj = nn.Linear(d_model, 2 * self.d_key + self.d_value, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2 * self.d_key + self.d_value, conv))
        self.beta_proj = nn.Linear(d_model, n_v_heads, bias=False)
        self.decay_proj = nn.Linear(d_model, n_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(n_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_v_heads))
        self.gate_proj = nn.Linear(d_model, self.d_value, bias=False)
        self.norm = nn.RMSNorm(head_v_dim, eps=1e-6)
        self.o_proj = nn.Linear(self.d_value, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Taps as a depthwise nn.Conv1d has them, decays as in Mamba-2."""
        nn.init.uniform_(self.conv_weight, -(self.conv**-0.5), self.conv**-0.5)
        reset_decay(self.dt_bias, self.A_log)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        qkv, _ = short_conv(self.qkv_proj(x), self.conv_weight, silu=True, seq_idx=seq_idx)
        o, _ = delta_rule(*self._operands(qkv, x), seq_idx=seq_idx)
        return self._output(o, x)

    def _heads(self, qkv: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As projected: q, k [B, T, G, K] of any length, v [B, T, H, V], steps and decays [B, T, H]."""
        q, k, v = torch.split(qkv, [self.d_key, self.d_key, self.d_value], dim=-1)
        q, k = (z.reshape(*z.shape[:2], -1, self.head_k_dim) for z in (q, k))
        v = v.reshape(*v.shape[:2], self.n_v_heads, self.head_v_dim)
        return q, k, v, self.beta_proj(x), self.decay_proj(x)

    def _operands(self, qkv: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Unit q and k, v, steps and log decays."""
        q, k, v, beta, decay = self._heads(qkv, x)
        g = -self.A_log.float().exp() * F.softplus(decay.float() + self.dt_bias.float())
        return l2_norm(q), l2_norm(k), v, self.max_beta * beta.float().sigmoid(), g

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(gated_rms_norm(o, self.gate_proj(x).view_as(o), self.norm.weight).flatten(-2))

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        shape = (batch, self.n_v_heads, self.head_k_dim, self.head_v_dim)
        return {
            "conv": torch.zeros(batch, self.conv - 1, 2 * self.d_key + self.d_value, device=device, dtype=dtype),
            "s": torch.zeros(shape, device=device, dtype=torch.float32),
        }

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        qkv, taps = short_conv(self.qkv_proj(x), self.conv_weight, silu=True, state=state["conv"])
        o, s = delta_rule(*self._operands(qkv, x), initial_state=state["s"])
        state["conv"].copy_(taps)
        state["s"].copy_(s)
        return self._output(o, x)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        qkv, _ = short_conv_step(self.qkv_proj(x), self.conv_weight, None, state["conv"], silu=True, inplace=True)
        q, k, v, beta, decay = (z[:, 0] for z in self._heads(qkv, x))
        o, _ = projected_delta_rule_step(
            q, k, v, beta, decay, self.A_log, self.dt_bias, state["s"], max_beta=self.max_beta, inplace=True
        )
        return self._output(o[:, None], x)
