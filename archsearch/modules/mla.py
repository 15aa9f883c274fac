"""Multi-head latent attention: keys and values live in one latent per token (DeepSeek-V2, 2405.04434)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archsearch.modules.norm import RMSNorm
from archsearch.modules.rotary import apply_rope
from archsearch_kernels.attention import attention


class MLA(nn.Module):
    """A latent c = norm(W_c x) of L numbers is cached; W_k c and W_v c are the heads' keys and values.

    One token at a time never forms those: q (W_k c) = (q W_k) c, so the queries are taken to the latents instead
    and the weighted latents to the values ("absorbed" weights). All heads then read the same numbers of each token.
    With `rope_dim` R > 0 every key has R rotated features more, which all heads share and the cache holds as well.
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
        self.q_latent_dim = q_latent_dim
        self.rope_theta = rope_theta
        self.reads_kv = reads_kv
        self.scale = (head_dim + rope_dim) ** -0.5
        if q_latent_dim:
            self.q_compress = nn.Linear(d_model, q_latent_dim, bias=False)
            self.q_latent_norm = RMSNorm(q_latent_dim, eps=1e-6)
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
        """Latents [B, S, L] that the tokens of x may see; with a state, the cached ones too.

        With `rope_dim` R > 0 the rotated features stand behind each latent, [B, S, L + R].
        """
        if self.rope_dim:
            c, k_rope = torch.split(self.kv_compress(x), [self.latent_dim, self.rope_dim], dim=-1)
            k_rope = apply_rope(k_rope[:, :, None], position, self.rope_theta, self.rope_dim)[:, :, 0]
            kv = torch.cat([self.latent_norm(c), k_rope], dim=-1)
        else:
            kv = self.latent_norm(self.kv_compress(x))
        if state is None:
            return kv
        end = position + x.shape[1]
        state["latent"][:, position:end] = kv
        return state["latent"][:, :end].to(kv.dtype)  # autocast computes in less than the cache holds

    def attend(self, x: Tensor, kv: Tensor, position: int = 0, seq_idx: Tensor | None = None) -> Tensor:
        """Queries of x [B, T, D] over kv, whose last T entries are x's own tokens."""
        h = self.q_latent_norm(self.q_compress(x)) if self.q_latent_dim else x
        q = self.q_proj(h).unflatten(-1, (self.n_heads, -1))  # [B, T, H, K]
        if x.shape[1] == 1:
            o = self._absorbed(q, kv, position)
        else:
            k = self.k_up(self._latents(kv)).unflatten(-1, (self.n_heads, -1))
            v = self.v_up(self._latents(kv)).unflatten(-1, (self.n_heads, -1))  # [B, S, H, V]
            if self.rope_dim:
                q = torch.cat(self._parts(q, position), dim=-1)
                k_rope = kv[:, :, None, self.latent_dim :].expand(-1, -1, self.n_heads, -1)
                k = torch.cat([k, k_rope], dim=-1)
            o = attention(q, k, v, scale=self.scale, seq_idx=seq_idx)  # [B, T, H, V]
        return self.o_proj(o.flatten(2))

    def _absorbed(self, q: Tensor, kv: Tensor, position: int) -> Tensor:
        """One query a head, [B, 1, H, K], over what `make_kv` gives."""
        k_up = self.k_up.weight.view(self.n_heads, -1, self.latent_dim)  # [H, head_dim, L]
        v_up = self.v_up.weight.view(self.n_heads, -1, self.latent_dim)  # [H, V, L]
        if self.rope_dim:
            q, q_rope = self._parts(q, position)
        q = torch.einsum("bthk,hkc->bthc", q, k_up)
        if self.rope_dim:
            q = torch.cat([q, q_rope], dim=-1)
        logits = q[:, 0] @ kv.mT * self.scale  # [B, H, S]
        weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).to(q.dtype)
        o = weights @ self._latents(kv)  # [B, H, L]
        return torch.einsum("bhc,hvc->bhv", o, v_up)[:, None]

    def _parts(self, q: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, head_dim + R]: the first features, and the last R, rotated."""
        q, q_rope = torch.split(q, [self.head_dim, self.rope_dim], dim=-1)
        return q, apply_rope(q_rope, position, self.rope_theta, self.rope_dim)

    def _latents(self, kv: Tensor) -> Tensor:
        return kv[..., : self.latent_dim] if self.rope_dim else kv

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.reads_kv:
            return {}
        width = self.kv_compress.out_features
        return {"latent": torch.zeros(batch, context, width, device=device, dtype=dtype)}

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        return self.attend(x, self.make_kv(x, state, position), position)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        return self.extend(x, state, position)
