"""Gated linear attention: a decay for every key feature, from a low-rank projection (Yang et al., 2312.06635)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch_kernels.gla import gla, gla_step
from archsearch_kernels.rms_norm import gated_rms_norm


class GLA(nn.Module):
    """Heads of K key and V value features; decay sigmoid(W x)^(1 / gate_normalizer); per-head norm and swish gate."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.head_k_dim = head_k_dim
        self.head_v_dim = head_v_dim
        self.gate_normalizer = gate_normalizer
        self.q_proj = nn.Linear(d_model, n_heads * head_k_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_heads * head_k_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_heads * head_v_dim, bias=False)
        self.decay_in = nn.Linear(d_model, gate_rank, bias=False)
        self.decay_out = nn.Linear(gate_rank, n_heads * head_k_dim, bias=True)
        self.gate_proj = nn.Linear(d_model, n_heads * head_v_dim, bias=False)
        self.norm = nn.RMSNorm(head_v_dim, eps=1e-6)
        self.o_proj = nn.Linear(n_heads * head_v_dim, d_model, bias=False)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        o, _ = gla(*self._heads(x), seq_idx=seq_idx)
        return self._output(o, x)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k [B, T, H, K], v [B, T, H, V] and log decays [B, T, H, K]."""
        g = F.logsigmoid(self.decay_out(self.decay_in(x)).float()) / self.gate_normalizer
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v, g = (z.reshape(*z.shape[:2], self.n_heads, -1) for z in (q, k, v, g))
        return q, k, v, g

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(gated_rms_norm(o, self.gate_proj(x).view_as(o), self.norm.weight).flatten(-2))

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        shape = (batch, self.n_heads, self.head_k_dim, self.head_v_dim)
        return {"s": torch.zeros(shape, device=device, dtype=torch.float32)}

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        o, state["s"] = gla(*self._heads(x), initial_state=state["s"])
        return self._output(o, x)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        q, k, v, g = (z[:, 0] for z in self._heads(x))
        o, state["s"] = gla_step(q, k, v, g, state["s"], inplace=True)
        return self._output(o[:, None], x)
