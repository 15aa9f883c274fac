"""Softmax attention with grouped queries; optional window, QK-norm, output gate and learned sink."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archsearch.modules.norm import RMSNorm
from archsearch.modules.rotary import apply_rope
from archsearch_kernels.attention import attention


class Attention(nn.Module):
    """Multi-head attention, MHA to MQA (2305.13245); `gate`: the output gate of Qwen3-Next (2505.06708)."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        rope_dims: int = 0,
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
        gate: str = "none",
        sink: bool = False,
        reads_kv: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.rope_dims = rope_dims
        self.rope_theta = rope_theta
        self.reads_kv = reads_kv
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=False)
        if not reads_kv:
            self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
            self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=1e-6) if qk_norm and not reads_kv else None
        gates = {"none": 0, "head": n_heads, "element": n_heads * head_dim}[gate]
        self.gate_proj = nn.Linear(d_model, gates, bias=False) if gates else None
        self.sink = nn.Parameter(torch.zeros(n_heads)) if sink else None

    def reset_parameters(self) -> None:
        """A sink of logit 0 counts like one more key of average score."""
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        return self.attend(x, self.make_kv(x), 0, seq_idx)

    def make_kv(self, x: Tensor, state: dict[str, Tensor] | None = None, position: int = 0) -> tuple[Tensor, ...]:
        """Keys and values [B, S, G, D] that the tokens of x may see; with a state, S counts the cached ones too."""
        B, T, _ = x.shape
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.rope_dims:
            k = apply_rope(k, position, self.rope_theta, self.rope_dims)
        if state is None:
            return k, v
        return self._cached("k", k, state, position), self._cached("v", v, state, position)

    def _cached(self, name: str, new: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        """Write `new` behind what the cache holds and return all of it; the cache of a `window` is a ring."""
        cache = state[name]
        T, room = new.shape[1], cache.shape[1]
        end = position + T
        if self.window is None or end <= room:
            cache[:, position:end] = new
            return cache[:, :end].to(new.dtype)  # autocast computes in less than the cache holds
        if T == 1:  # one token replaces the one that leaves the window; the order of keys does not matter to it
            cache[:, position % room] = new[:, 0]
            return cache.to(new.dtype)
        held = min(position, room)
        old = cache[:, [p % room for p in range(position - held, position)]]
        all_kv = torch.cat([old.to(new.dtype), new], dim=1)
        kept = min(room, all_kv.shape[1])
        cache[:, [p % room for p in range(end - kept, end)]] = all_kv[:, -kept:].to(cache.dtype)
        return all_kv

    def attend(self, x: Tensor, kv: tuple[Tensor, ...], position: int = 0, seq_idx: Tensor | None = None) -> Tensor:
        """Queries of x [B, T, D] over kv, whose last T entries are x's own tokens."""
        k, v = kv
        if self.reads_kv and x.shape[1] == 1 and self.window is not None and self.window < k.shape[1] <= position:
            # another block's wider window: its ring is out of order, and only part of it is ours
            mine = torch.arange(position + 1 - self.window, position + 1, device=x.device) % k.shape[1]
            k, v = k[:, mine], v[:, mine]
        o = attention(self._queries(x, position), k, v, window=self.window, sink=self.sink, seq_idx=seq_idx)
        return self._output(o, x)

    def _queries(self, x: Tensor, position: int) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.n_heads, self.head_dim))  # [B, T, H, D]
        if self.q_norm is not None:
            q = self.q_norm(q)
        return apply_rope(q, position, self.rope_theta, self.rope_dims) if self.rope_dims else q

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        if self.gate_proj is not None:
            o = o * self.gate_proj(x).sigmoid().unflatten(-1, (self.n_heads, -1))
        return self.o_proj(o.flatten(2))

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.reads_kv:
            return {}
        room = context if self.window is None else min(self.window, context)
        shape = (batch, room, self.n_kv_heads, self.head_dim)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        return self.attend(x, self.make_kv(x, state, position), position)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        return self.extend(x, state, position)
