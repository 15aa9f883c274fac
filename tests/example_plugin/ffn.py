"""An FFN as a package of one's own may add it, spec and module in one file: ReGLU (2002.05202)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from archsearch.contract import FFNSpec, ModuleCall, Site
from archsearch.quantity import Number


class ReGLU(FFNSpec):
    """Three matrices, W_down (max(W_gate x, 0) W_up x); `expand` x d_model hidden features."""

    kind: Literal["reglu"] = "reglu"
    expand: Annotated[Number, Field(gt=0)] = 2.0

    def d_hidden(self, site: Site) -> int:
        """Hidden width at this site."""
        return round(self.expand * site.d_model)

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(f"{__name__}:ReGLUModule", {"d_model": site.d_model, "d_hidden": self.d_hidden(site)})

    def num_params(self, site: Site) -> int:
        return 3 * site.d_model * self.d_hidden(site)

    def flops(self, site: Site, n_tokens: int) -> int:
        return 2 * n_tokens * self.num_params(site)


class ReGLUModule(nn.Module):
    """down(relu(gate(x)) * up(x)); x [B, T, D]."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.up_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.gate_proj(x)) * self.up_proj(x))
