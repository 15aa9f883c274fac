"""Softmax attention: MHA, GQA, MQA, full or sliding window (Vaswani 2017; 2305.13245; Mistral 2310.06825)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from archsearch.contract import MixerSpec, ModuleCall, Site
from archsearch.quantity import Number, Span


def causal_pairs(n_tokens: int, window: int | None) -> int:
    """Query-key pairs a causal mask of `window` lets through: sum over t of min(t, window)."""
    w = n_tokens if window is None else min(window, n_tokens)
    return w * (w + 1) // 2 + (n_tokens - w) * w


class GroupedAttention(MixerSpec):
    """What every attention with keys and values per head shares; subclasses say which keys a query sees.

    `kv_groups` query heads share one key/value head: 1 is MHA, `all` is MQA. A small proxy may have fewer heads than
    that; then all of them share one, as at the target the group does.
    """

    head_dim: Annotated[int, Field(ge=2)] = 64
    """features of a head; the heads fill expand x d_model"""
    expand: Annotated[Number, Field(gt=0)] = 1.0
    """width of all query heads / d_model"""
    kv_groups: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    """query heads that share one key/value head; 1 is MHA, all is MQA"""
    position: Literal["rope", "none"] = "rope"
    """rotary positions (RoPE), or none"""
    rope_theta: Annotated[Number, Field(gt=1)] = 10000.0
    """base of the rotary frequencies"""
    rope_fraction: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """share of head_dim that is rotated"""
    qk_norm: bool = False
    """RMSNorm on the queries and keys of every head"""
    gate: Literal["none", "head", "element"] = "none"
    """sigmoid gate on the output, per head or per feature"""

    def n_heads(self, site: Site) -> int:
        """Query heads at this width."""
        return round(self.expand * site.d_model) // self.head_dim

    def n_kv_heads(self, site: Site) -> int:
        """Key/value heads at this width."""
        return 1 if self.kv_groups == "all" else max(1, self.n_heads(site) // self.kv_groups)

    def rope_dims(self) -> int:
        """Rotated features of each head (even)."""
        return 0 if self.position == "none" else 2 * (round(self.head_dim * self.rope_fraction) // 2)

    def check(self, site: Site) -> None:
        check_heads(self.head_dim, self.expand, site)
        heads = self.n_heads(site)
        if self.kv_groups != "all" and heads > self.kv_groups and heads % self.kv_groups:
            raise ValueError(
                f"kv_groups {self.kv_groups} does not divide the {heads} heads of d_model {site.d_model}; "
                f"write a divisor of {heads}, or all"
            )
        if self.position == "rope" and self.rope_dims() == 0:
            raise ValueError(
                f"rope_fraction {self.rope_fraction:g} of head_dim {self.head_dim} rotates nothing; "
                f"write at least {2 / self.head_dim:g}, or position: none"
            )

    def arguments(self, site: Site) -> dict[str, Any]:
        """The module's arguments that all of the family take."""
        return {
            "d_model": site.d_model,
            "n_heads": self.n_heads(site),
            "n_kv_heads": self.n_kv_heads(site),
            "head_dim": self.head_dim,
            "rope_dims": self.rope_dims(),
            "rope_theta": self.rope_theta,
            "qk_norm": self.qk_norm,
            "gate": self.gate,
            "reads_kv": site.reads_kv,
        }

    def matrix_params(self, site: Site) -> int:
        """Weights of all projections; each meets every token once."""
        queries = self.n_heads(site) * self.head_dim
        keys = 0 if site.reads_kv else self.n_kv_heads(site) * self.head_dim
        gates = {"none": 0, "head": self.n_heads(site), "element": queries}[self.gate]
        return site.d_model * (2 * queries + 2 * keys + gates)

    def num_params(self, site: Site) -> int:
        norms = self.head_dim * (1 if site.reads_kv else 2) if self.qk_norm else 0
        return self.matrix_params(site) + norms

    def kv_bytes(self, site: Site, n_tokens: int, dtype_bytes: int) -> int:
        """Keys and values of `n_tokens` tokens."""
        return 2 * n_tokens * self.n_kv_heads(site) * self.head_dim * dtype_bytes

    def kv_format(self, site: Site) -> Hashable | None:
        return (
            self.kind,
            self.n_kv_heads(site),
            self.head_dim,
            self.rope_dims(),
            self.rope_theta if self.rope_dims() else None,
            self.qk_norm,
        )


class Attention(GroupedAttention):
    """Every earlier token, or the last `window` of them; `sink` learns one logit per head to attend to nothing."""

    kind: Literal["attention"] = "attention"
    window: Span | None = None
    """tokens that a query sees, itself included; left out: all before it"""
    sink: bool = False
    """a learned logit per head, to attend to nothing"""

    spans: ClassVar[tuple[str, ...]] = ("window",)

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.attention:Attention",
            {**self.arguments(site), "window": self.window, "sink": self.sink},
        )

    def num_params(self, site: Site) -> int:
        return super().num_params(site) + (self.n_heads(site) if self.sink else 0)

    def flops(self, site: Site, n_tokens: int) -> int:
        """2 T params + 4 H K per query-key pair that the mask lets through."""
        pairs = causal_pairs(n_tokens, self._window())
        return 2 * n_tokens * self.matrix_params(site) + 4 * self.n_heads(site) * self.head_dim * pairs

    def step_flops(self, site: Site, context: int) -> int:
        return 2 * self.matrix_params(site) + 4 * self.n_heads(site) * self.head_dim * self._held(context)

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        return 0 if site.reads_kv else self.kv_bytes(site, self._held(context), dtype_bytes)

    def _window(self) -> int | None:
        assert not isinstance(self.window, str), "spans are resolved by at_context before costs are read"
        return self.window

    def _held(self, context: int) -> int:
        return min(self._window() or context, context)

    def can_read(self, source: MixerSpec, site: Site) -> bool:
        if not isinstance(source, Attention) or not super().can_read(source, site):
            return False
        own, other = self._window(), source._window()
        return other is None or (own is not None and own <= other)


def check_heads(head_dim: int, expand: float, site: Site) -> None:
    """Raise ValueError unless heads of `head_dim` fill the width `expand` x d_model exactly."""
    width = round(expand * site.d_model)
    if width < head_dim or width % head_dim:
        raise ValueError(
            f"head_dim {head_dim} does not divide the width {width} (expand {expand:g} x d_model {site.d_model}); "
            f"write a divisor of {width}"
        )
