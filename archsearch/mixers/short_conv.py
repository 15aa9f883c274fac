"""LFM2's gated short convolution (Liquid AI, 2511.23404): the cheapest mixer, blind beyond a few tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import MixerSpec, ModuleCall, Site


class ShortConv(MixerSpec):
    """A depthwise convolution between two gates computed from the input."""

    kind: Literal["short_conv"] = "short_conv"
    kernel: Annotated[int, Field(ge=1)] = 3
    """taps, the token itself included"""

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall("archsearch.modules.short_conv:ShortConv", {"d_model": site.d_model, "kernel": self.kernel})

    def num_params(self, site: Site) -> int:
        return 4 * site.d_model**2 + self.kernel * site.d_model

    def flops(self, site: Site, n_tokens: int) -> int:
        return n_tokens * 8 * site.d_model**2

    def step_flops(self, site: Site, context: int) -> int:
        return 8 * site.d_model**2

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        return (self.kernel - 1) * site.d_model * dtype_bytes
