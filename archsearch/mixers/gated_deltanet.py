"""Gated DeltaNet: the delta rule with a decay per head (2412.06464); the linear layers of Qwen3-Next."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import FLOAT32_BYTES, MixerSpec, ModuleCall, Site
from archsearch.mixers.attention import check_heads
from archsearch.mixers.deltanet import check_value_dim, delta_rule_flops, delta_rule_step_flops
from archsearch.quantity import Number


class GatedDeltaNet(MixerSpec):
    """Heads of head_dim key features fill expand x d_model; each serves `value_groups` heads of values.

    Published: expand 3/4 and expand_v 2 (the paper, 6 d_model^2 weights); head_dim 128, expand 1, expand_v 1 and
    value_groups 2 (Qwen3-Next). neg_eigenvalues: steps up to 2 (2411.12537).
    """

    kind: Literal["gated_deltanet"] = "gated_deltanet"
    head_dim: Annotated[int, Field(ge=1)] = 64
    """of queries and keys"""
    expand: Annotated[Number, Field(gt=0)] = 1.0
    """width of all keys / d_model"""
    expand_v: Annotated[Number, Field(gt=0)] = 2.0
    """value features / key features of a head"""
    value_groups: Annotated[int, Field(ge=1)] = 1
    """value heads of one key head"""
    conv: Annotated[int, Field(ge=1)] = 4
    """taps of the short convolutions on q, k and v"""
    neg_eigenvalues: bool = False
    """steps up to 2, so that a state may change its sign (2411.12537)"""

    def n_k_heads(self, site: Site) -> int:
        """Query and key heads at this width."""
        return round(self.expand * site.d_model) // self.head_dim

    def n_v_heads(self, site: Site) -> int:
        """Value heads at this width."""
        return self.n_k_heads(site) * self.value_groups

    def head_v_dim(self) -> int:
        """Value features of a head."""
        return round(self.expand_v * self.head_dim)

    def check(self, site: Site) -> None:
        check_heads(self.head_dim, self.expand, site)
        check_value_dim(self.head_dim, self.expand_v)

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.gated_deltanet:GatedDeltaNet",
            {
                "d_model": site.d_model,
                "n_k_heads": self.n_k_heads(site),
                "n_v_heads": self.n_v_heads(site),
                "head_k_dim": self.head_dim,
                "head_v_dim": self.head_v_dim(),
                "conv": self.conv,
                "neg_eigenvalues": self.neg_eigenvalues,
            },
        )

    def _d_value(self, site: Site) -> int:
        return self.n_v_heads(site) * self.head_v_dim()

    def _d_conv(self, site: Site) -> int:
        return 2 * self.n_k_heads(site) * self.head_dim + self._d_value(site)

    def _matrix_params(self, site: Site) -> int:
        gate_and_output, beta_and_decay = 2 * self._d_value(site), 2 * self.n_v_heads(site)
        return site.d_model * (self._d_conv(site) + gate_and_output + beta_and_decay)

    def num_params(self, site: Site) -> int:
        decay = 2 * self.n_v_heads(site)  # A_log, dt_bias
        return self._matrix_params(site) + self.conv * self._d_conv(site) + decay + self.head_v_dim()

    def flops(self, site: Site, n_tokens: int) -> int:
        op = delta_rule_flops(self.n_v_heads(site), self.head_dim, self.head_v_dim())
        return n_tokens * (2 * self._matrix_params(site) + op)

    def step_flops(self, site: Site, context: int) -> int:
        op = delta_rule_step_flops(self.n_v_heads(site), self.head_dim, self.head_v_dim())
        return 2 * self._matrix_params(site) + op

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        state = self.head_dim * self._d_value(site) * FLOAT32_BYTES
        return state + (self.conv - 1) * self._d_conv(site) * dtype_bytes
