"""Mamba: the selective state space model S6 (Gu and Dao, 2312.00752), with Jamba's inner norms as an option."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import FLOAT32_BYTES, MixerSpec, ModuleCall, Site
from archsearch.quantity import Number


class Mamba(MixerSpec):
    """`expand` x d_model channels with `d_state` states each; no heads, so no matrix products over tokens.

    Counted FLOPs of the scan, per token and state: 2 to update it, 2 to read it; training and decoding alike.
    """

    kind: Literal["mamba"] = "mamba"
    expand: Annotated[Number, Field(gt=0)] = 2.0
    """channels / d_model"""
    d_state: Annotated[int, Field(ge=1)] = 16
    """states of a channel"""
    conv: Annotated[int, Field(ge=1)] = 4
    """taps of the short convolution"""
    dt_rank: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """rank of the step sizes; auto: d_model / 16, rounded up"""
    inner_norm: bool = False
    """RMSNorm on dt, B and C (Jamba, 2403.19887)"""

    def d_inner(self, site: Site) -> int:
        """Channels at this width."""
        return round(self.expand * site.d_model)

    def rank(self, site: Site) -> int:
        """Rank of the step sizes at this width."""
        return math.ceil(site.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    def check(self, site: Site) -> None:
        if self.d_inner(site) == 0:
            raise ValueError(f"expand {self.expand:g} leaves no channel of d_model {site.d_model}; write a larger one")

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.mamba:Mamba",
            {
                "d_model": site.d_model,
                "d_inner": self.d_inner(site),
                "d_state": self.d_state,
                "dt_rank": self.rank(site),
                "conv": self.conv,
                "inner_norm": self.inner_norm,
            },
        )

    def _matrix_params(self, site: Site) -> int:
        return self.d_inner(site) * (3 * site.d_model + 2 * self.rank(site) + 2 * self.d_state)

    def num_params(self, site: Site) -> int:
        per_channel = self.conv + self.d_state + 3  # convolution, A, and the biases of convolution and dt, D
        norms = self.rank(site) + 2 * self.d_state if self.inner_norm else 0
        return self._matrix_params(site) + self.d_inner(site) * per_channel + norms

    def flops(self, site: Site, n_tokens: int) -> int:
        return n_tokens * self.step_flops(site, n_tokens)

    def step_flops(self, site: Site, context: int) -> int:
        return 2 * self._matrix_params(site) + 4 * self.d_inner(site) * self.d_state

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        return self.d_inner(site) * (self.d_state * FLOAT32_BYTES + (self.conv - 1) * dtype_bytes)
