"""Mixture of block attention: each query picks the blocks it attends to (MoBA, 2502.13189)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from archsearch.contract import FLOAT32_BYTES, ModuleCall, Site
from archsearch.mixers.attention import GroupedAttention, causal_pairs
from archsearch.quantity import Span


class MoBA(GroupedAttention):
    """Its own block always, and of the blocks wholly in its past the top_k - 1 whose mean key fits the query best.

    Every query head picks for itself, also where heads share keys and values. The picking has no weights and no
    gradient. It prunes the reading, not the cache. With top_k blocks or fewer in the context it *is* full attention:
    give the proxy scale a few times more (block_size as a fraction of the context does, at every scale).
    """

    kind: Literal["moba"] = "moba"
    block_size: Span = "1/16 context"
    """tokens of a block"""
    top_k: Annotated[int, Field(ge=1)] = 4
    """blocks that a query attends to, its own included"""

    spans: ClassVar[tuple[str, ...]] = ("block_size",)

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.moba:MoBA",
            {**self.arguments(site), "block_size": self._block(), "top_k": self.top_k},
        )

    def flops(self, site: Site, n_tokens: int) -> int:
        """2 T params + 4 H K per query and key it attends to + 2 H K per query and mean it scores."""
        c = self._block()
        n, rest = divmod(n_tokens, c)  # whole blocks of queries, and the queries of the last one
        own = n * causal_pairs(c, None) + causal_pairs(rest, None)
        chosen = (causal_pairs(n, self.top_k) - n) * c * c + rest * self._chosen(n) * c
        scored = c * (causal_pairs(n - 1, None) - causal_pairs(self.top_k - 1, None)) if n > self.top_k > 1 else 0
        scored += rest * self._scored(n)
        per_pair = 2 * self.n_heads(site) * self.head_dim
        return 2 * n_tokens * self.matrix_params(site) + per_pair * (2 * (own + chosen) + scored)

    def step_flops(self, site: Site, context: int) -> int:
        """As `flops` for one token, its own block counted whole wherever in the block it stands."""
        past = (context - 1) // self._block()
        keys = min(context, (1 + self._chosen(past)) * self._block())
        per_pair = 2 * self.n_heads(site) * self.head_dim
        return 2 * self.matrix_params(site) + per_pair * (2 * keys + self._scored(past))

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        """Keys, values and the mean key of each block that can be past, in fp32."""
        if site.reads_kv:
            return 0
        means = (context - 1) // self._block() * self.n_kv_heads(site) * self.head_dim * FLOAT32_BYTES
        return self.kv_bytes(site, context, dtype_bytes) + means

    def kv_format(self, site: Site) -> Hashable | None:
        return super().kv_format(site), self._block()

    def _block(self) -> int:
        assert not isinstance(self.block_size, str), "spans are resolved by at_context before costs are read"
        return self.block_size

    def _chosen(self, past: int) -> int:
        """Past blocks read by a query that has `past` behind it."""
        return min(self.top_k - 1, past)

    def _scored(self, past: int) -> int:
        """Past blocks scored: none where all of them are read."""
        return past if past >= self.top_k > 1 else 0
