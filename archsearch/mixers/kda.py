"""Kimi delta attention: the delta rule with a decay per key feature (Kimi Linear, 2510.26692)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import FLOAT32_BYTES, MixerSpec, ModuleCall, Site
from archsearch.mixers.attention import check_heads
from archsearch.mixers.deltanet import check_value_dim, delta_rule_flops, delta_rule_step_flops
from archsearch.quantity import Number


class KDA(MixerSpec):
    """Heads of K = head_dim key and V = expand_v x head_dim value features, as many as fill expand x d_model with keys.

    Decay and output gate have rank K and V. Kimi Linear: head_dim 128, expand 16/9, expand_v 1, and attention layers
    without rotary positions beside it.
    """

    kind: Literal["kda"] = "kda"
    head_dim: Annotated[int, Field(ge=1)] = 64
    """of queries and keys"""
    expand: Annotated[Number, Field(gt=0)] = 1.0
    """width of all keys / d_model"""
    expand_v: Annotated[Number, Field(gt=0)] = 1.0
    """value features / key features of a head"""
    conv: Annotated[int, Field(ge=1)] = 4
    """taps of the short convolutions on q, k and v"""

    def n_heads(self, site: Site) -> int:
        """Heads at this width."""
        return round(self.expand * site.d_model) // self.head_dim

    def head_v_dim(self) -> int:
        """Value features of a head."""
        return round(self.expand_v * self.head_dim)

    def check(self, site: Site) -> None:
        check_heads(self.head_dim, self.expand, site)
        check_value_dim(self.head_dim, self.expand_v)

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.kda:KDA",
            {
                "d_model": site.d_model,
                "n_heads": self.n_heads(site),
                "head_k_dim": self.head_dim,
                "head_v_dim": self.head_v_dim(),
                "conv": self.conv,
            },
        )

    def _d_key(self, site: Site) -> int:
        return self.n_heads(site) * self.head_dim

    def _d_value(self, site: Site) -> int:
        return self.n_heads(site) * self.head_v_dim()

    def _d_conv(self, site: Site) -> int:
        return 2 * self._d_key(site) + self._d_value(site)

    def _matrix_params(self, site: Site) -> int:
        K, V = self.head_dim, self.head_v_dim()
        wide = site.d_model * (self._d_conv(site) + self._d_value(site) + self.n_heads(site))  # q, k, v, o, beta
        decay, gate = K * (site.d_model + self._d_key(site)), V * (site.d_model + self._d_value(site))
        return wide + decay + gate

    def num_params(self, site: Site) -> int:
        decay = self.n_heads(site) + self._d_key(site)  # A_log, dt_bias
        return self._matrix_params(site) + self.conv * self._d_conv(site) + decay + self.head_v_dim()

    def flops(self, site: Site, n_tokens: int) -> int:
        op = delta_rule_flops(self.n_heads(site), self.head_dim, self.head_v_dim())
        return n_tokens * (2 * self._matrix_params(site) + op)

    def step_flops(self, site: Site, context: int) -> int:
        op = delta_rule_step_flops(self.n_heads(site), self.head_dim, self.head_v_dim())
        return 2 * self._matrix_params(site) + op

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        state = self.head_dim * self._d_value(site) * FLOAT32_BYTES
        return state + (self.conv - 1) * self._d_conv(site) * dtype_bytes
