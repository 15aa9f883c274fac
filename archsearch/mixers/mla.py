"""Multi-head latent attention: one low-rank latent per token is all that the cache holds (DeepSeek-V2, 2405.04434)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import MixerSpec, ModuleCall, Site
from archsearch.mixers.attention import causal_pairs, check_heads
from archsearch.quantity import Number, round_to


class MLA(MixerSpec):
    """Keys and values of every head are read off a latent; position sits in a small rotated key all heads share.

    rope_dim 0 is the variant without positions (Kimi Linear, 2510.26692). The latents are a fraction of d_model,
    rounded up to a multiple of 8 (DeepSeek-V3: 512 and 1536 of 7168).
    """

    kind: Literal["mla"] = "mla"
    head_dim: Annotated[int, Field(ge=1)] = 64
    """of queries and keys, without their rotated part"""
    v_head_dim: Annotated[int, Field(ge=1)] | None = None
    """of values; left out: head_dim"""
    rope_dim: Annotated[int, Field(ge=0, multiple_of=2)] = 32
    """rotated features, in a key that all heads share; 0: no positions"""
    rope_theta: Annotated[Number, Field(gt=1)] = 10000.0
    """base of the rotary frequencies"""
    expand: Annotated[Number, Field(gt=0)] = 1.0
    """heads x head_dim / d_model"""
    latent: Annotated[Number, Field(gt=0)] = 1 / 4
    """width of the latent of keys and values / d_model"""
    q_latent: Annotated[Number, Field(gt=0)] | None = None
    """width of the latent of queries / d_model; left out: projected directly"""

    def n_heads(self, site: Site) -> int:
        """Heads at this width."""
        return round(self.expand * site.d_model) // self.head_dim

    def value_dim(self) -> int:
        """Features of each head's values."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def latent_dim(self, site: Site) -> int:
        """Features of the latent of keys and values."""
        return round_to(self.latent * site.d_model, 8)

    def q_latent_dim(self, site: Site) -> int | None:
        """Features of the latent of queries, if they have one."""
        return None if self.q_latent is None else round_to(self.q_latent * site.d_model, 8)

    def check(self, site: Site) -> None:
        check_heads(self.head_dim, self.expand, site)

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.mla:MLA",
            {
                "d_model": site.d_model,
                "n_heads": self.n_heads(site),
                "head_dim": self.head_dim,
                "v_head_dim": self.value_dim(),
                "rope_dim": self.rope_dim,
                "latent_dim": self.latent_dim(site),
                "q_latent_dim": self.q_latent_dim(site),
                "rope_theta": self.rope_theta,
                "reads_kv": site.reads_kv,
            },
        )

    def _matrix_params(self, site: Site) -> int:
        D, H, C = site.d_model, self.n_heads(site), self.latent_dim(site)
        queries = H * (self.head_dim + self.rope_dim)
        q_latent = self.q_latent_dim(site)
        q = D * queries if q_latent is None else (D + queries) * q_latent
        down = 0 if site.reads_kv else D * (C + self.rope_dim)
        up = C * H * (self.head_dim + self.value_dim())
        return q + down + up + H * self.value_dim() * D

    def num_params(self, site: Site) -> int:
        norms = (0 if site.reads_kv else self.latent_dim(site)) + (self.q_latent_dim(site) or 0)
        return self._matrix_params(site) + norms

    def flops(self, site: Site, n_tokens: int) -> int:
        """2 T params + 2 H (K + R + V) per query-key pair: training expands the latents into every head's keys."""
        per_pair = 2 * self.n_heads(site) * (self.head_dim + self.rope_dim + self.value_dim())
        return 2 * n_tokens * self._matrix_params(site) + per_pair * causal_pairs(n_tokens, None)

    def step_flops(self, site: Site, context: int) -> int:
        """2 params + 2 H (2 C + R) per cached token: with absorbed weights the heads attend over the latents."""
        per_key = 2 * self.n_heads(site) * (2 * self.latent_dim(site) + self.rope_dim)
        return 2 * self._matrix_params(site) + per_key * context

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        return 0 if site.reads_kv else context * (self.latent_dim(site) + self.rope_dim) * dtype_bytes

    def kv_format(self, site: Site) -> Hashable | None:
        """The latent and the rotated key; a reader has heads and up-projections of its own."""
        return self.kind, self.latent_dim(site), self.rope_dim, self.rope_theta if self.rope_dim else None
