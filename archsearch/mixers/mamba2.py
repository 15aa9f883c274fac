"""Mamba-2: a state space model whose scan is linear attention with one decay per head (Dao and Gu, 2405.21060)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import FLOAT32_BYTES, MixerSpec, ModuleCall, Site
from archsearch.quantity import Number

CHUNK = 64  # tokens; what the training form's cost is counted with


class Mamba2(MixerSpec):
    """`expand` x d_model channels in heads of P = head_dim; N = d_state; G = n_groups pairs of B and C for all heads
    (one a head where a small proxy has fewer heads than that).

    Counted FLOPs of the training form, per token: 2 C N for a group, 2 C P + 4 N P for a head, chunks of C = 64.
    """

    kind: Literal["mamba2"] = "mamba2"
    head_dim: Annotated[int, Field(ge=1)] = 64
    """channels of a head"""
    expand: Annotated[Number, Field(gt=0)] = 2.0
    """channels / d_model"""
    d_state: Annotated[int, Field(ge=1)] = 128
    """states of a channel"""
    n_groups: Annotated[int, Field(ge=1)] = 1
    """pairs of B and C; the heads of a group share one"""
    conv: Annotated[int, Field(ge=1)] = 4
    """taps of the short convolution"""

    def d_inner(self, site: Site) -> int:
        """Channels at this width."""
        return round(self.expand * site.d_model)

    def n_heads(self, site: Site) -> int:
        """Heads at this width."""
        return self.d_inner(site) // self.head_dim

    def groups(self, site: Site) -> int:
        """Pairs of B and C at this width."""
        return min(self.n_groups, self.n_heads(site))

    def check(self, site: Site) -> None:
        width, heads = self.d_inner(site), self.n_heads(site)
        if width < self.head_dim or width % self.head_dim:
            raise ValueError(
                f"head_dim {self.head_dim} does not divide the width {width} (expand {self.expand:g} x "
                f"d_model {site.d_model}); write a divisor of {width}"
            )
        if heads > self.n_groups and heads % self.n_groups:
            raise ValueError(
                f"n_groups {self.n_groups} does not divide the {heads} heads of d_model {site.d_model}; "
                f"write a divisor of {heads}"
            )

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.mamba2:Mamba2",
            {
                "d_model": site.d_model,
                "n_heads": self.n_heads(site),
                "head_dim": self.head_dim,
                "d_state": self.d_state,
                "n_groups": self.groups(site),
                "conv": self.conv,
            },
        )

    def _d_conv(self, site: Site) -> int:
        return self.d_inner(site) + 2 * self.groups(site) * self.d_state

    def _matrix_params(self, site: Site) -> int:
        return site.d_model * (2 * self.d_inner(site) + self._d_conv(site) + self.n_heads(site))

    def num_params(self, site: Site) -> int:
        conv = self._d_conv(site) * (self.conv + 1)
        return self._matrix_params(site) + conv + 3 * self.n_heads(site) + self.d_inner(site)  # dt, A, D; norm

    def flops(self, site: Site, n_tokens: int) -> int:
        within = 2 * CHUNK * (self.groups(site) * self.d_state + self.d_inner(site))
        state = 4 * self.d_state * self.d_inner(site)
        return n_tokens * (2 * self._matrix_params(site) + within + state)

    def step_flops(self, site: Site, context: int) -> int:
        return 2 * self._matrix_params(site) + 4 * self.d_state * self.d_inner(site)

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        state = self.d_inner(site) * self.d_state * FLOAT32_BYTES
        return state + (self.conv - 1) * self._d_conv(site) * dtype_bytes
