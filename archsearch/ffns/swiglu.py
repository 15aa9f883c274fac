"""SwiGLU feed-forward (Shazeer, 2002.05202)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import FFNSpec, ModuleCall, Site
from archsearch.quantity import Number, round_to


class SwiGLU(FFNSpec):
    """Three matrices; `expand` is hidden width / d_model, rounded up to a multiple of 16."""

    kind: Literal["swiglu"] = "swiglu"
    expand: Annotated[Number, Field(gt=0)] = 8 / 3
    """hidden width / d_model"""

    def d_hidden(self, site: Site) -> int:
        """Hidden width at this site."""
        return round_to(self.expand * site.d_model, 16)

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.swiglu:SwiGLU", {"d_model": site.d_model, "d_hidden": self.d_hidden(site)}
        )

    def num_params(self, site: Site) -> int:
        return 3 * site.d_model * self.d_hidden(site)

    def flops(self, site: Site, n_tokens: int) -> int:
        return 2 * n_tokens * self.num_params(site)
