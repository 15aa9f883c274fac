"""Mixture of block attention (MoBA, 2502.13189): softmax attention over the blocks that each query picks."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch.modules.attention import Attention
from archsearch_kernels.block_sparse_attention import block_means, block_sparse_attention


class MoBA(Attention):
    """Attention to the own block and the top_k - 1 past blocks of best q . mean(k); each query head picks its own.

    The decode state holds, beside keys and values, the mean key of every block that is full and past.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        block_size: int,
        top_k: int,
        rope_dims: int = 0,
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
        gate: str = "none",
        reads_kv: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            n_heads,
            n_kv_heads,
            head_dim,
            rope_dims=rope_dims,
            rope_theta=rope_theta,
            qk_norm=qk_norm,
            gate=gate,
            reads_kv=reads_kv,
        )
        self.block_size = block_size
        self.top_k = top_k

    def make_kv(self, x: Tensor, state: dict[str, Tensor] | None = None, position: int = 0) -> tuple[Tensor, ...]:
        """Keys and values [B, S, G, D] as in `Attention`, and the mean keys [B, N, G, D] of the past blocks."""
        k, v = super().make_kv(x, state, position)
        if state is None:
            return k, v, block_means(k, self.block_size)
        end, c = position + x.shape[1], self.block_size
        done, full = max(0, position - 1) // c, (end - 1) // c  # blocks behind the last token: before and now
        if full > done:
            state["mean"][:, done:full] = block_means(k[:, done * c :], c)
        return k, v, state["mean"][:, :full]

    def attend(self, x: Tensor, kv: tuple[Tensor, ...], position: int = 0, seq_idx: Tensor | None = None) -> Tensor:
        """Queries of x [B, T, D] over kv, whose last T entries are x's own tokens."""
        k, v, means = kv
        o = block_sparse_attention(
            self._queries(x, position),
            k,
            v,
            block_size=self.block_size,
            top_k=self.top_k,
            means=means,
            seq_idx=seq_idx,
        )
        return self._output(o, x)

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        state = super().init_state(batch, context, device, dtype)
        if self.reads_kv:
            return state
        past = (context - 1) // self.block_size
        shape = (batch, past, self.n_kv_heads, self.head_dim)
        return {**state, "mean": torch.zeros(shape, device=device, dtype=torch.float32)}
