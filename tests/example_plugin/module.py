"""The torch code of `spec.Average`, with one place for each flaw."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """A moving average per feature; a row of `forward` starts anew at every document."""

    def __init__(self, d_model: int, flaw: str = "") -> None:
        super().__init__()
        self.flaw = flaw
        self.in_proj = nn.Linear(d_model, d_model, bias=False)
        self.decay = nn.Parameter(torch.zeros(d_model))
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        if flaw == "dead weight":
            self.unused = nn.Linear(d_model, d_model, bias=False)
        self.register_buffer("gain", torch.ones(d_model), persistent=flaw != "not saved")

    def reset_parameters(self) -> None:
        if self.flaw != "uninitialised":
            nn.init.zeros_(self.decay)
        nn.init.normal_(self.gain) if self.flaw == "not saved" else nn.init.ones_(self.gain)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        if self.flaw == "looks ahead":
            x = (x + x.roll(-1, dims=1)) / 2
        if self.flaw == "mixes rows":
            x = x - x.mean(dim=0)
        if self.flaw == "remembers":
            self.gain += 1e-3
        if self.flaw == "mixes documents":
            seq_idx = None
        return self._run(x, x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32), seq_idx)[0]

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"h": torch.zeros(batch, self.decay.shape[0], device=device)}

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        h = torch.zeros_like(state["h"]) if self.flaw == "forgets" and x.shape[1] > 1 else state["h"]
        y, h = self._run(x, h)
        state["h"].copy_(h)
        return y

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        return self.extend(x, state, position)

    def _run(self, x: Tensor, h: Tensor, seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a = self.decay.float().sigmoid()
        u = self.in_proj(x).float()
        rows = []
        for t in range(x.shape[1]):
            if seq_idx is not None and t > 0:
                h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None]
            h = a * h + (1 - a) * u[:, t]
            rows.append(h)
        y = torch.stack(rows, dim=1)
        y = y if self.flaw == "widens" else y.to(x.dtype)
        return self.o_proj(y.to(self.o_proj.weight.dtype)).to(y.dtype) * self.gain.to(y.dtype), h
