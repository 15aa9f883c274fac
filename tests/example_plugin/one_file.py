"""A mixer as a package of one's own may add it, spec and module in one file: an exponential moving average."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from archsearch.contract import FLOAT32_BYTES, MixerSpec, ModuleCall, Site
from archsearch.quantity import Number


class EMA(MixerSpec):
    """h_t = a h_{t-1} + (1 - a) u_t with one learned a per channel; `expand` x d_model channels u = W x."""

    kind: Literal["ema"] = "ema"
    expand: Annotated[Number, Field(gt=0)] = 1.0

    def channels(self, site: Site) -> int:
        """Channels at this width."""
        return round(self.expand * site.d_model)

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(f"{__name__}:EMAMixer", {"d_model": site.d_model, "d_inner": self.channels(site)})

    def num_params(self, site: Site) -> int:
        return self.channels(site) * (2 * site.d_model + 1)

    def flops(self, site: Site, n_tokens: int) -> int:
        return n_tokens * self.step_flops(site, 1)

    def step_flops(self, site: Site, context: int) -> int:
        return 4 * site.d_model * self.channels(site)

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        return self.channels(site) * FLOAT32_BYTES


class EMAMixer(nn.Module):
    """The average runs token by token, in float32; it starts anew at every document."""

    def __init__(self, d_model: int, d_inner: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, d_inner, bias=False)
        self.decay = nn.Parameter(torch.empty(d_inner))
        self.o_proj = nn.Linear(d_inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Averages over 2 to 20 tokens."""
        memory = torch.linspace(0.5, 0.95, self.decay.shape[0], device=self.decay.device)
        with torch.no_grad():
            self.decay.copy_(memory.logit())

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]."""
        empty = torch.zeros(x.shape[0], self.decay.shape[0], device=x.device)
        return self._average(x, empty, seq_idx)[0]

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The running average [B, channels]."""
        return {"average": torch.zeros(batch, self.decay.shape[0], device=device)}

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        """T more tokens."""
        y, last = self._average(x, state["average"], None)
        state["average"].copy_(last)
        return y

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        """One more token."""
        return self.extend(x, state, position)

    def _average(self, x: Tensor, average: Tensor, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
        a = self.decay.float().sigmoid()
        u = (1 - a) * self.in_proj(x).float()
        averages = []
        for t in range(x.shape[1]):
            if seq_idx is not None and t > 0:
                average = average * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None]
            average = a * average + u[:, t]
            averages.append(average)
        return self.o_proj(torch.stack(averages, dim=1).to(x.dtype)), average
