"""Gated linear attention: a decay for every key feature and token (Yang et al., 2312.06635)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import FLOAT32_BYTES, MixerSpec, ModuleCall, Site
from archsearch.quantity import Number

CHUNK = 64  # tokens; what the training form's cost is counted with


class GLA(MixerSpec):
    """Keys are half as wide as d_model and values as wide, so a head of K keys has 2 K values.

    Counted FLOPs of the training form, per token and head: 2 C (K + V) within a chunk of C = 64, 4 K V for the state.
    """

    kind: Literal["gla"] = "gla"
    head_dim: Annotated[int, Field(ge=1)] = 64
    """of queries and keys"""
    expand_k: Annotated[Number, Field(gt=0)] = 0.5
    """width of all keys / d_model"""
    expand_v: Annotated[Number, Field(gt=0)] = 1.0
    """width of all values / d_model"""
    gate_rank: Annotated[int, Field(ge=1)] = 16
    """rank of the projection that gives the decays"""
    gate_normalizer: Annotated[Number, Field(gt=0)] = 16.0
    """the decay is sigmoid^(1 / this)"""

    def n_heads(self, site: Site) -> int:
        """Heads at this width."""
        return round(self.expand_k * site.d_model) // self.head_dim

    def d_value(self, site: Site) -> int:
        """Width of all values at this width."""
        return round(self.expand_v * site.d_model)

    def check(self, site: Site) -> None:
        width, values = round(self.expand_k * site.d_model), self.d_value(site)
        if width < self.head_dim or width % self.head_dim:
            raise ValueError(
                f"head_dim {self.head_dim} does not divide the key width {width} (expand_k {self.expand_k:g} x "
                f"d_model {site.d_model}); write a divisor of {width}"
            )
        if values == 0 or values % self.n_heads(site):
            raise ValueError(
                f"the {self.n_heads(site)} heads do not divide the value width {values} of d_model {site.d_model}; "
                f"write an expand_v that is a multiple of {self.n_heads(site)}/{site.d_model}"
            )

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.gla:GLA",
            {
                "d_model": site.d_model,
                "n_heads": self.n_heads(site),
                "head_k_dim": self.head_dim,
                "head_v_dim": self.d_value(site) // self.n_heads(site),
                "gate_rank": self.gate_rank,
                "gate_normalizer": self.gate_normalizer,
            },
        )

    def _d_key(self, site: Site) -> int:
        return self.n_heads(site) * self.head_dim

    def _matrix_params(self, site: Site) -> int:
        keys, values = self._d_key(site), self.d_value(site)
        return site.d_model * (2 * keys + 3 * values + self.gate_rank) + self.gate_rank * keys

    def num_params(self, site: Site) -> int:
        return self._matrix_params(site) + self._d_key(site) + self.d_value(site) // self.n_heads(site)

    def flops(self, site: Site, n_tokens: int) -> int:
        op = 2 * CHUNK * (self._d_key(site) + self.d_value(site)) + 4 * self.head_dim * self.d_value(site)
        return n_tokens * (2 * self._matrix_params(site) + op)

    def step_flops(self, site: Site, context: int) -> int:
        return 2 * self._matrix_params(site) + 4 * self.head_dim * self.d_value(site)

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        return self.head_dim * self.d_value(site) * FLOAT32_BYTES
