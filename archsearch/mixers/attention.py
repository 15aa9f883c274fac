"""Softmax attention: MHA, GQA, MQA, full or sliding window (Vaswani 2017; 2305.13245; Mistral 2310.06825)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from archsearch.contract import MixerSpec, ModuleCall, Site
from archsearch.quantity import Number, Span


def causal_pairs(n_tokens: int, window: int | None) -> int:
    """Query-key pairs a causal mask of `window` lets through: sum over t of min(t, window)."""
    w = n_tokens if window is None else min(window, n_tokens)
    return w * (w + 1) // 2 + (n_tokens - w) * w


class Attention(MixerSpec):
    """`kv_groups` query heads share one key/value head: 1 is MHA, `all` is MQA."""

    kind: Literal["attention"] = "attention"
    head_dim: Annotated[int, Field(ge=2)] = 64
    expand: Annotated[Number, Field(gt=0)] = 1.0  # width of all query heads / d_model
    kv_groups: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    window: Span | None = None  # tokens, itself included
    position: Literal["rope", "none"] = "rope"
    rope_theta: Annotated[Number, Field(gt=1)] = 10000.0
    rope_fraction: Annotated[Number, Field(gt=0, le=1)] = 1.0  # share of head_dim that is rotated
    qk_norm: bool = False
    gate: Literal["none", "head", "element"] = "none"
    sink: bool = False

    spans: ClassVar[tuple[str, ...]] = ("window",)

    def n_heads(self, site: Site) -> int:
        """Query heads at this width."""
        return round(self.expand * site.d_model) // self.head_dim

    def n_kv_heads(self, site: Site) -> int:
        """Key/value heads at this width."""
        return 1 if self.kv_groups == "all" else self.n_heads(site) // self.kv_groups

    def rope_dims(self) -> int:
        """Rotated features of each head (even)."""
        return 0 if self.position == "none" else 2 * (round(self.head_dim * self.rope_fraction) // 2)

    def check(self, site: Site) -> None:
        width = round(self.expand * site.d_model)
        if width < self.head_dim or width % self.head_dim:
            raise ValueError(
                f"head_dim {self.head_dim} does not divide the width {width} (expand {self.expand:g} x "
                f"d_model {site.d_model})"
            )
        heads = self.n_heads(site)
        if self.kv_groups != "all" and heads % self.kv_groups:
            raise ValueError(
                f"kv_groups {self.kv_groups} does not divide the {heads} heads of d_model {site.d_model}; "
                f"write a divisor of {heads}, or all"
            )

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.attention:Attention",
            {
                "d_model": site.d_model,
                "n_heads": self.n_heads(site),
                "n_kv_heads": self.n_kv_heads(site),
                "head_dim": self.head_dim,
                "window": self.window,
                "rope_dims": self.rope_dims(),
                "rope_theta": self.rope_theta,
                "qk_norm": self.qk_norm,
                "gate": self.gate,
                "sink": self.sink,
                "reads_kv": site.reads_kv,
            },
        )

    def _matrix_params(self, site: Site) -> int:
        queries = self.n_heads(site) * self.head_dim
        keys = 0 if site.reads_kv else self.n_kv_heads(site) * self.head_dim
        gates = {"none": 0, "head": self.n_heads(site), "element": queries}[self.gate]
        return site.d_model * (2 * queries + 2 * keys + gates)

    def num_params(self, site: Site) -> int:
        norms = self.head_dim * (1 if site.reads_kv else 2) if self.qk_norm else 0
        return self._matrix_params(site) + norms + (self.n_heads(site) if self.sink else 0)

    def flops(self, site: Site, n_tokens: int) -> int:
        pairs = causal_pairs(n_tokens, self._window())
        return 2 * n_tokens * self._matrix_params(site) + 4 * self.n_heads(site) * self.head_dim * pairs

    def step_flops(self, site: Site, context: int) -> int:
        keys = context if self.window is None else min(self._window() or context, context)
        return 2 * self._matrix_params(site) + 4 * self.n_heads(site) * self.head_dim * keys

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        if site.reads_kv:
            return 0
        held = context if self.window is None else min(self._window() or context, context)
        return 2 * held * self.n_kv_heads(site) * self.head_dim * dtype_bytes

    def _window(self) -> int | None:
        assert not isinstance(self.window, str), "spans are resolved by at_context before costs are read"
        return self.window

    def kv_format(self, site: Site) -> Hashable | None:
        return (
            self.kind,
            self.n_kv_heads(site),
            self.head_dim,
            self.rope_dims(),
            self.rope_theta,
            self.qk_norm,
        )

    def can_read(self, source: MixerSpec, site: Site) -> bool:
        if not isinstance(source, Attention) or not super().can_read(source, site):
            return False
        own, other = self._window(), source._window()
        return other is None or (own is not None and own <= other)
