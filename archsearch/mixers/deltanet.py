"""DeltaNet: linear attention whose writes correct what is recalled (2102.11174; parallel form 2406.06484)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import FLOAT32_BYTES, MixerSpec, ModuleCall, Site
from archsearch.mixers.attention import check_heads
from archsearch.quantity import Number

CHUNK = 64  # tokens; what the training form's cost is counted with


def delta_rule_flops(n_heads: int, key_dim: int, value_dim: int) -> int:
    """Of one token in chunks of C = 64: C (6 K + 4 V) + C^2 within the chunk and 6 K V for the state, each head."""
    K, V = key_dim, value_dim
    return n_heads * (CHUNK * (6 * K + 4 * V) + CHUNK**2 + 6 * K * V)


def delta_rule_step_flops(n_heads: int, key_dim: int, value_dim: int) -> int:
    """Of one token after another: recall, write, read, each head."""
    return n_heads * 6 * key_dim * value_dim


def check_value_dim(head_dim: int, expand_v: float) -> None:
    """Raise ValueError unless expand_v x head_dim is a whole number of features."""
    value_dim = head_dim * expand_v
    if round(value_dim) < 1 or abs(value_dim - round(value_dim)) > 1e-6:
        raise ValueError(
            f"expand_v {expand_v:g} x head_dim {head_dim} is not a whole number of value features; "
            f"write a multiple of {1 / head_dim:g}"
        )


class DeltaNet(MixerSpec):
    """Heads of K = head_dim key and V = expand_v x head_dim value features, as many as fill expand x d_model with keys.

    gate: SiLU output gate (not in the paper). neg_eigenvalues: steps up to 2 (2411.12537).
    """

    kind: Literal["deltanet"] = "deltanet"
    head_dim: Annotated[int, Field(ge=1)] = 64
    """of queries and keys"""
    expand: Annotated[Number, Field(gt=0)] = 1.0
    """width of all keys / d_model"""
    expand_v: Annotated[Number, Field(gt=0)] = 1.0
    """value features / key features of a head"""
    conv: Annotated[int, Field(ge=1)] = 4
    """taps of the short convolutions on q, k and v"""
    gate: bool = False
    """SiLU gate on the output (not in the paper)"""
    neg_eigenvalues: bool = False
    """steps up to 2, so that a state may change its sign (2411.12537)"""

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
            "archsearch.modules.deltanet:DeltaNet",
            {
                "d_model": site.d_model,
                "n_heads": self.n_heads(site),
                "head_k_dim": self.head_dim,
                "head_v_dim": self.head_v_dim(),
                "conv": self.conv,
                "gate": self.gate,
                "neg_eigenvalues": self.neg_eigenvalues,
            },
        )

    def _d_conv(self, site: Site) -> int:
        return self.n_heads(site) * (2 * self.head_dim + self.head_v_dim())

    def _matrix_params(self, site: Site) -> int:
        heads = self.n_heads(site)
        values = heads * self.head_v_dim()
        return site.d_model * (self._d_conv(site) + heads + values * (2 if self.gate else 1))

    def num_params(self, site: Site) -> int:
        return self._matrix_params(site) + self.conv * self._d_conv(site) + self.head_v_dim()

    def flops(self, site: Site, n_tokens: int) -> int:
        op = delta_rule_flops(self.n_heads(site), self.head_dim, self.head_v_dim())
        return n_tokens * (2 * self._matrix_params(site) + op)

    def step_flops(self, site: Site, context: int) -> int:
        op = delta_rule_step_flops(self.n_heads(site), self.head_dim, self.head_v_dim())
        return 2 * self._matrix_params(site) + op

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        state = self.n_heads(site) * self.head_dim * self.head_v_dim() * FLOAT32_BYTES
        return state + (self.conv - 1) * self._d_conv(site) * dtype_bytes
