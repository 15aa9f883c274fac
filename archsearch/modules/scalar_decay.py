"""Linear attention with one decay per head: RetNet (2307.08621), Lightning (2501.08313), simple GLA (2312.06635)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.modules.rotary import apply_rope
from archsearch_kernels.rms_norm import gated_rms_norm
from archsearch_kernels.scalar_decay import scalar_decay, scalar_decay_step
from archsearch_kernels.short_conv import short_conv


class ScalarDecay(nn.Module):
    """Heads of K key and V value features, a short convolution over `conv` tokens in front.

    "retnet": head h decays by 1 - 2^(-5 - h); q and k are rotated; every head is normed and gated by SiLU(W x).
    "lightning": head h of H decays by exp(-2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5)), slower in later layers l of
    L, the last one remembering nearly everything (MiniMax-01); SiLU on q, k and v without a convolution; all heads
    are normed as one and gated by sigmoid(W x). "simple_gla": a head decays by sigmoid(w x)^(1 / gate_normalizer);
    every head is normed and gated by SiLU(W x).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        variant: str,
        conv: int = 0,
        rope_theta: float = 10000.0,
        gate_normalizer: float = 16.0,
        layer_idx: int = 0,
        n_layers: int = 1,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.head_k_dim = head_k_dim
        self.head_v_dim = head_v_dim
        self.variant = variant
        self.conv = conv
        self.rope_theta = rope_theta
        self.gate_normalizer = gate_normalizer
        if variant == "lightning":
            self.slope_scale = 1 - layer_idx / (n_layers - 1 + 1e-5) + 1e-5
        self.scale = 1.0 if variant == "lightning" else head_k_dim**-0.5
        self.widths = [n_heads * head_k_dim, n_heads * head_k_dim, n_heads * head_v_dim]
        self.qkv_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        if conv:
            self.conv_weight = nn.Parameter(torch.empty(sum(self.widths), conv))
        if variant == "simple_gla":
            self.decay_proj = nn.Linear(d_model, n_heads)
        self.gate_proj = nn.Linear(d_model, n_heads * head_v_dim, bias=False)
        self.norm = nn.RMSNorm(n_heads * head_v_dim if variant == "lightning" else head_v_dim, eps=1e-6)
        self.o_proj = nn.Linear(n_heads * head_v_dim, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.conv:
            nn.init.uniform_(self.conv_weight, -(self.conv**-0.5), self.conv**-0.5)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        q, k, v = self._heads(self._projected(x, seq_idx=seq_idx), 0)
        o, _ = scalar_decay(q, k, v, self._log_decay(x), scale=self.scale, seq_idx=seq_idx)
        return self._output(o, x)

    def _projected(self, x: Tensor, state: dict[str, Tensor] | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """q, k and v side by side; with `conv` convolved, and a state's taps updated."""
        qkv = self.qkv_proj(x)
        if self.conv:
            taps = None if state is None else state["conv"]
            qkv, taps = short_conv(qkv, self.conv_weight, silu=True, state=taps, seq_idx=seq_idx)
            if state is not None:
                state["conv"] = taps.clone()
        elif self.variant == "lightning":
            qkv = F.silu(qkv)
        return qkv

    def _heads(self, qkv: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, T, H, K] and v [B, T, H, V]."""
        q, k, v = (z.reshape(*z.shape[:2], self.n_heads, -1) for z in torch.split(qkv, self.widths, dim=-1))
        if self.variant == "retnet":
            q, k = (apply_rope(z, position, self.rope_theta, 2 * (self.head_k_dim // 2)) for z in (q, k))
        return q, k, v

    def _log_decay(self, x: Tensor) -> Tensor:
        if self.variant == "simple_gla":
            return F.logsigmoid(self.decay_proj(x).float()) / self.gate_normalizer  # [B, T, H]
        head = torch.arange(self.n_heads, device=x.device, dtype=torch.float32)
        if self.variant == "lightning":
            return -torch.exp2(-8 * (head + 1) / self.n_heads) * self.slope_scale  # [H]
        return torch.log1p(-torch.exp2(-5 - head))  # [H]

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        if self.variant == "lightning":
            return self.o_proj(gated_rms_norm(o.flatten(-2), gate, self.norm.weight, activation="sigmoid"))
        return self.o_proj(gated_rms_norm(o, gate.view_as(o), self.norm.weight).flatten(-2))

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        shape = (batch, self.n_heads, self.head_k_dim, self.head_v_dim)
        state = {"s": torch.zeros(shape, device=device, dtype=torch.float32)}
        if self.conv:
            state["conv"] = torch.zeros(batch, self.conv - 1, sum(self.widths), device=device, dtype=dtype)
        return state

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        q, k, v = self._heads(self._projected(x, state), position)
        o, state["s"] = scalar_decay(q, k, v, self._log_decay(x), scale=self.scale, initial_state=state["s"])
        return self._output(o, x)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        q, k, v = (z[:, 0] for z in self._heads(self._projected(x, state), position))
        g = self._log_decay(x)[:, 0] if self.variant == "simple_gla" else self._log_decay(x)
        o, _ = scalar_decay_step(q, k, v, g, state["s"], scale=self.scale, inplace=True)
        return self._output(o[:, None], x)
