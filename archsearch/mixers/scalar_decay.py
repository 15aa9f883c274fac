"""Linear attention with one decay per head: RetNet (2307.08621), Lightning (2501.08313), simple GLA (2312.06635)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import FLOAT32_BYTES, MixerSpec, ModuleCall, Site
from archsearch.quantity import Number

CHUNK = 64  # tokens; what the training form's cost is counted with


class ScalarDecay(MixerSpec):
    """The decay is fixed per head (retnet), per head and layer (lightning, MiniMax-01) or from the input (simple_gla).

    Counted FLOPs of the training form, per token and head: 2 C (K + V) within a chunk of C = 64, 4 K V for the state.
    """

    kind: Literal["scalar_decay"] = "scalar_decay"
    variant: Literal["retnet", "lightning", "simple_gla"] = "simple_gla"
    """decay fixed per head, per head and layer, or read from the input"""
    head_dim: Annotated[int, Field(ge=2)] = 64
    """of queries and keys"""
    expand: Annotated[Number, Field(gt=0)] = 1.0
    """width of all keys / d_model"""
    expand_v: Annotated[Number, Field(gt=0)] | None = None
    """width of all values / d_model; left out: 2 for retnet, 1 for the others"""
    conv: Annotated[int, Field(ge=0)] = 0
    """taps of a short convolution on q, k and v; 0: none"""
    rope_theta: Annotated[Number, Field(gt=1)] = 10000.0
    """base of the rotary frequencies (retnet)"""
    gate_normalizer: Annotated[Number, Field(gt=0)] = 16.0
    """the decay is sigmoid^(1 / this) (simple_gla)"""

    def n_heads(self, site: Site) -> int:
        """Heads at this width."""
        return round(self.expand * site.d_model) // self.head_dim

    def d_value(self, site: Site) -> int:
        """Width of all values at this width."""
        expand_v = self.expand_v or (2.0 if self.variant == "retnet" else 1.0)
        return round(expand_v * site.d_model)

    def check(self, site: Site) -> None:
        width, values = round(self.expand * site.d_model), self.d_value(site)
        if width < self.head_dim or width % self.head_dim:
            raise ValueError(
                f"head_dim {self.head_dim} does not divide the key width {width} (expand {self.expand:g} x "
                f"d_model {site.d_model}); write a divisor of {width}"
            )
        if values == 0 or values % self.n_heads(site):
            raise ValueError(
                f"the {self.n_heads(site)} heads do not divide the value width {values} of d_model {site.d_model}; "
                f"write an expand_v that is a multiple of {self.n_heads(site)}/{site.d_model}"
            )

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.scalar_decay:ScalarDecay",
            {
                "d_model": site.d_model,
                "n_heads": self.n_heads(site),
                "head_k_dim": self.head_dim,
                "head_v_dim": self.d_value(site) // self.n_heads(site),
                "variant": self.variant,
                "conv": self.conv,
                "rope_theta": self.rope_theta,
                "gate_normalizer": self.gate_normalizer,
                "layer_idx": site.layer_idx,
                "n_layers": site.n_layers,
            },
        )

    def _d_qkv(self, site: Site) -> int:
        return 2 * self.n_heads(site) * self.head_dim + self.d_value(site)

    def _matrix_params(self, site: Site) -> int:
        decay = self.n_heads(site) if self.variant == "simple_gla" else 0
        return site.d_model * (self._d_qkv(site) + 2 * self.d_value(site) + decay)  # qkv, gate and output, decay

    def num_params(self, site: Site) -> int:
        heads, values = self.n_heads(site), self.d_value(site)
        norm = values if self.variant == "lightning" else values // heads
        bias = heads if self.variant == "simple_gla" else 0
        return self._matrix_params(site) + self.conv * self._d_qkv(site) + norm + bias

    def flops(self, site: Site, n_tokens: int) -> int:
        keys, values = self.n_heads(site) * self.head_dim, self.d_value(site)
        op = 2 * CHUNK * (keys + values) + 4 * self.head_dim * values
        return n_tokens * (2 * self._matrix_params(site) + op)

    def step_flops(self, site: Site, context: int) -> int:
        return 2 * self._matrix_params(site) + 4 * self.head_dim * self.d_value(site)

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        taps = max(self.conv - 1, 0) * self._d_qkv(site)
        return self.head_dim * self.d_value(site) * FLOAT32_BYTES + taps * dtype_bytes
