"""No FFN: a block that is only a mixer (Mamba's own layout, Nemotron-H)."""

from __future__ import annotations

from typing import Literal

from archsearch.contract import FFNSpec, ModuleCall, Site


class NoFFN(FFNSpec):
    """The block skips its FFN, norm included."""

    kind: Literal["none"] = "none"

    def call(self, site: Site) -> ModuleCall:
        raise AssertionError("a block with ffn none builds no ffn")

    def num_params(self, site: Site) -> int:
        return 0

    def flops(self, site: Site, n_tokens: int) -> int:
        return 0
