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
    """Heads of K key and V value features, a short convolution over `conv` tokens in front if conv > 0.

    | variant    | decay of head h                                     | q, k, v      | output                        |
    | ---------- | --------------------------------------------------- | ------------ | ----------------------------- |
    | retnet     | 1 - 2^(-5 - h)                                      | rotary q, k  | per-head norm, swish gate     |
    | lightning  | exp(-2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5))   | SiLU         | norm of all, sigmoid gate     |
    | simple_gla | sigmoid(W x)^(1 / gate_normalizer)                  |              | per-head norm, swish gate     |

    Lightning's slopes are MiniMax-01's: slower in later layers l of L, the last one remembering nearly everything.
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
        self.slope_scale = 1 - layer_idx / (n_layers - 1 + 1e-5) + 1e-5
        self.scale = 1.0 if variant == "lightning" else head_k_dim**-0.5
        self.widths = [n_heads * head_k_dim, n_heads * head_k_dim, n_heads * head_v_dim]
        self.qkv_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.widths), conv)) if conv else None
        self.decay_proj = nn.Linear(d_model, n_heads) if variant == "simple_gla" else None
        self.gate_proj = nn.Linear(d_model, n_heads * head_v_dim, bias=False)
        self.norm = nn.RMSNorm(n_heads * head_v_dim if variant == "lightning" else head_v_dim, eps=1e-6)
        self.o_proj = nn.Linear(n_heads * head_v_dim, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.conv_weight is not None:
            nn.init.uniform_(self.conv_weight, -(self.conv**-0.5), self.conv**-0.5)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        q, k, v, _ = self._heads(x, 0, None, seq_idx)
        o, _ = scalar_decay(q, k, v, self._log_decay(x), scale=self.scale, seq_idx=seq_idx)
        return self._output(o, x)

    def _heads(
        self, x: Tensor, position: int, taps: Tensor | None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k [B, T, H, K], v [B, T, H, V] and what the convolution has to remember."""
        qkv = self.qkv_proj(x)
        if self.conv_weight is not None:
            qkv, taps = short_conv(qkv, self.conv_weight, silu=True, state=taps, seq_idx=seq_idx)
        elif self.variant == "lightning":
            qkv = F.silu(qkv)
        q, k, v = (z.reshape(*z.shape[:2], self.n_heads, -1) for z in torch.split(qkv, self.widths, dim=-1))
        if self.variant == "retnet":
            q, k = (apply_rope(z, position, self.rope_theta, 2 * (self.head_k_dim // 2)) for z in (q, k))
        return q, k, v, taps

    def _log_decay(self, x: Tensor) -> Tensor:
        """[B, T, H] where it depends on the input, else [H]."""
        if self.decay_proj is not None:
            return F.logsigmoid(self.decay_proj(x).float()) / self.gate_normalizer
        head = torch.arange(self.n_heads, device=x.device, dtype=torch.float32)
        if self.variant == "lightning":
            return -torch.exp2(-8 * (head + 1) / self.n_heads) * self.slope_scale
        return torch.log1p(-torch.exp2(-5 - head))

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
        q, k, v, taps = self._heads(x, position, state.get("conv"))
        o, state["s"] = scalar_decay(q, k, v, self._log_decay(x), scale=self.scale, initial_state=state["s"])
        if taps is not None:
            state["conv"] = taps.clone()
        return self._output(o, x)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        q, k, v, taps = self._heads(x, position, state.get("conv"))
        g = self._log_decay(x)
        g = g if g.dim() == 1 else g[:, 0]
        o, _ = scalar_decay_step(q[:, 0], k[:, 0], v[:, 0], g, state["s"], scale=self.scale, inplace=True)
        if taps is not None:
            state["conv"] = taps.clone()
        return self._output(o[:, None], x)
