"""Mixers side by side on the same input, fused into one output (Hymba, 2411.13676; Falcon-H1, 2507.22448)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from archsearch.modules.norm import RMSNorm


class Parallel(nn.Module):
    """`sum` of the outputs, mean of the RMS-normed outputs (`mean_norm`), or `concat` and a projection."""

    def __init__(self, mixers: list[nn.Module], d_model: int, fuse: str = "mean_norm") -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.fuse = fuse
        if fuse == "mean_norm":
            self.norms = nn.ModuleList(RMSNorm(d_model, eps=1e-6) for _ in mixers)
        if fuse == "concat":
            self.o_proj = nn.Linear(len(mixers) * d_model, d_model, bias=False)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        return self._fused([mixer(x, seq_idx) for mixer in self.mixers])

    def _fused(self, outputs: list[Tensor]) -> Tensor:
        if self.fuse == "sum":
            y = torch.stack(outputs).sum(0)
        elif self.fuse == "mean_norm":
            norms: list[Any] = list(self.norms)
            normed = [norm(y) for norm, y in zip(norms, outputs, strict=True)]
            y = torch.stack(normed).mean(0)
        elif self.fuse == "concat":
            y = self.o_proj(torch.cat(outputs, dim=-1))
        return y

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The states of all mixers in one, each name behind its mixer's number: `0.k`, `1.conv`."""
        mixers: list[Any] = list(self.mixers)
        states = [mixer.init_state(batch, context, device, dtype) for mixer in mixers]
        return {f"{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        outputs = []
        mixers: list[Any] = list(self.mixers)
        for i, mixer in enumerate(mixers):
            own = part_of(state, f"{i}.")
            outputs.append(mixer.extend(x, own, position))
            put_back(own, state, f"{i}.")
        return self._fused(outputs)

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        outputs = []
        mixers: list[Any] = list(self.mixers)
        for i, mixer in enumerate(mixers):
            own = part_of(state, f"{i}.")
            outputs.append(mixer.step(x, own, position))
            put_back(own, state, f"{i}.")
        return self._fused(outputs)


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def put_back(own: dict[str, Tensor], state: dict[str, Tensor], prefix: str) -> None:
    """The inverse of `part_of`: a mixer may have put new tensors in place of the old."""
    state.update({prefix + name: tensor for name, tensor in own.items()})
