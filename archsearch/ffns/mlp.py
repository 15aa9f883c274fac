"""Feed-forward with two matrices: GELU (1606.08415) or squared ReLU (Primer, 2109.08668; Nemotron, 2402.16819)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import FFNSpec, ModuleCall, Site
from archsearch.quantity import Number, round_to


class MLP(FFNSpec):
    """Two matrices; `expand` is hidden width / d_model, rounded up to a multiple of 16."""

    kind: Literal["mlp"] = "mlp"
    activation: Literal["gelu", "relu2"] = "gelu"
    """GELU, or ReLU squared"""
    expand: Annotated[Number, Field(gt=0)] = 4.0
    """hidden width / d_model"""

    def d_hidden(self, site: Site) -> int:
        """Hidden width at this site."""
        return round_to(self.expand * site.d_model, 16)

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.mlp:MLP",
            {"d_model": site.d_model, "d_hidden": self.d_hidden(site), "activation": self.activation},
        )

    def num_params(self, site: Site) -> int:
        return 2 * site.d_model * self.d_hidden(site)

    def flops(self, site: Site, n_tokens: int) -> int:
        return 2 * n_tokens * self.num_params(site)
