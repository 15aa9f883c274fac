"""Multi-head latent attention: keys and values live in one latent per token (DeepSeek-V2, 2405.04434)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archsearch.modules.norm import RMSNorm
from archsearch.modules.rotary import apply_rope
from archsearch_kernels.attention import attention


class MLA(nn.Module):
    """A latent c = norm(W_c x) and one rotated key are cached; W_k c and W_v c are the heads' keys and values.

    One token at a time never forms those: q (W_k c) = (q W_k) c, so the queries are taken to the latents instead
    and the weighted latents to the values ("absorbed" weights). All heads then read the same C + R numbers a token.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_dim: int,
        v_head_dim: int,
        rope_dim: int,
        latent_dim: int,
        q_latent_dim: int | None = None,
        rope_theta: float = 10000.0,
        reads_kv: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self.rope_dim = rope_dim
        self.latent_dim = latent_dim
        self.rope_theta = rope_theta
        self.reads_kv = reads_kv
        self.scale = (head_dim + rope_dim) ** -0.5
        self.q_compress = nn.Linear(d_model, q_latent_dim, bias=False) if q_latent_dim else None
        self.q_latent_norm = RMSNorm(q_latent_dim, eps=1e-6) if q_latent_dim else None
        self.q_proj = nn.Linear(q_latent_dim or d_model, n_heads * (head_dim + rope_dim), bias=False)
        if not reads_kv:
            self.kv_compress = nn.Linear(d_model, latent_dim + rope_dim, bias=False)
            self.latent_norm = RMSNorm(latent_dim, eps=1e-6)
        self.k_up = nn.Linear(latent_dim, n_heads * head_dim, bias=False)
        self.v_up = nn.Linear(latent_dim, n_heads * v_head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * v_head_dim, d_model, bias=False)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        return self.attend(x, self.make_kv(x), 0, seq_idx)

    def make_kv(self, x: Tensor, state: dict[str, Tensor] | None = None, position: int = 0) -> Tensor:
        """Latents and rotated keys [B, S, C + R] that the tokens of x may see; with a state, the cached ones too."""
        c, k_rope = self.kv_compress(x).split([self.latent_dim, self.rope_dim], dim=-1)
        kv = torch.cat([self.latent_norm(c), self._rotated(k_rope[:, :, None], position)[:, :, 0]], dim=-1)
        if state is None:
            return kv
        end = position + x.shape[1]
        state["latent"][:, position:end] = kv
        return state["latent"][:, :end].to(kv.dtype)  # autocast computes in less than the cache holds

    def attend(self, x: Tensor, kv: Tensor, position: int = 0, seq_idx: Tensor | None = None) -> Tensor:
        """Queries of x [B, T, D] over kv, whose last T entries are x's own tokens."""
        q = x
        if self.q_compress is not None and self.q_latent_norm is not None:
            q = self.q_latent_norm(self.q_compress(x))
        q = self.q_proj(q).unflatten(-1, (self.n_heads, -1))  # [B, T, H, K + R]
        q, q_rope = torch.split(q, [self.head_dim, self.rope_dim], dim=-1)
        q_rope = self._rotated(q_rope, position)
        if x.shape[1] == 1:
            o = self._absorbed(q, q_rope, kv)
        else:
            c, k_rope = torch.split(kv, [self.latent_dim, self.rope_dim], dim=-1)
            k = self.k_up(c).unflatten(-1, (self.n_heads, -1))  # [B, S, H, K]
            v = self.v_up(c).unflatten(-1, (self.n_heads, -1))  # [B, S, H, V]
            k_rope = k_rope[:, :, None].expand(-1, -1, self.n_heads, -1)
            q, k = torch.cat([q, q_rope], dim=-1), torch.cat([k, k_rope], dim=-1)
            o = attention(q, k, v, scale=self.scale, seq_idx=seq_idx)  # [B, T, H, V]
        return self.o_proj(o.flatten(2))

    def _absorbed(self, q: Tensor, q_rope: Tensor, kv: Tensor) -> Tensor:
        """One query a head, [B, 1, H, K] and [B, 1, H, R], over the latents [B, S, C + R]."""
        k_up = self.k_up.weight.view(self.n_heads, -1, self.latent_dim)  # [H, K, C]
        v_up = self.v_up.weight.view(self.n_heads, -1, self.latent_dim)  # [H, V, C]
        q = torch.cat([torch.einsum("bthk,hkc->bthc", q, k_up), q_rope], dim=-1)[:, 0]  # [B, H, C + R]
        logits = q @ kv.mT * self.scale  # [B, H, S]
        weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).to(q.dtype)
        o = weights @ kv[..., : self.latent_dim]  # [B, H, C]
        return torch.einsum("bhc,hvc->bhv", o, v_up)[:, None]

    def _rotated(self, x: Tensor, position: int) -> Tensor:
        return apply_rope(x, position, self.rope_theta, self.rope_dim) if self.rope_dim else x

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.reads_kv:
            return {}
        return {"latent": torch.zeros(batch, context, self.latent_dim + self.rope_dim, device=device, dtype=dtype)}

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        return self.attend(x, self.make_kv(x, state, position), position)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        return self.extend(x, state, position)
