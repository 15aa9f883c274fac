"""The short convolution, over sequences and packed documents, and its decode step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from case import Case, Inputs
from torch import Tensor

from archsearch_kernels.short_conv import reference, short_conv, short_conv_step


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def make(B: int, T: int, D: int, W: int, documents: int = 0) -> Inputs:
    torch.manual_seed(0)
    given = {"x": normal(B, T, D).requires_grad_(), "weight": normal(D, W).requires_grad_()}
    if documents:
        given["seq_idx"] = (
            (torch.arange(T, device="cuda", dtype=torch.int32) * documents // T).expand(B, T).contiguous()
        )
    return given


def torch_conv(x: Tensor, weight: Tensor) -> Tensor:
    D, W = weight.shape
    return F.silu(F.conv1d(x.mT, weight[:, None], padding=W - 1, groups=D)[..., : x.shape[1]]).mT


def fla(x: Tensor, weight: Tensor) -> Any:
    from fla.modules.causal_conv1d.ops import causal_conv1d

    return causal_conv1d(x, weight, activation="silu")[0]


def sequences(B: int, T: int, D: int, W: int, documents: int = 0) -> Case:
    tensor = 2.0 * B * T * D  # bytes
    return Case(
        op="short_conv",
        shape=f"B{B} T{T} D{D} W{W}" + (f" in {documents} documents" if documents else ""),
        inputs=lambda: make(B, T, D, W, documents),
        run=lambda **given: short_conv(**given, silu=True),
        reference=lambda **given: reference.short_conv(**given, silu=True),
        small=lambda: make(B, 301, D, W, documents),
        peers={} if documents else {"torch": torch_conv, "fla": fla},
        bytes=(2 * tensor, 5 * tensor),
        against=None if documents else "fla",
        goal=None if documents else 0.8,
    )


def step(B: int, D: int, W: int) -> Case:
    def inputs() -> Inputs:
        torch.manual_seed(0)
        return {"x": normal(B, D), "weight": normal(D, W), "bias": normal(D), "state": normal(B, W - 1, D)}

    return Case(
        op="short_conv_step",
        shape=f"B{B} D{D} W{W}",
        inputs=inputs,
        run=lambda **given: short_conv_step(**given, silu=True, inplace=True),
        reference=lambda state, **given: reference.short_conv_step(**given, state=state.clone(), silu=True),
        small=inputs,
        bytes=(2.0 * D * (2 * B + 2 * B * (W - 1) + W + 1), 0.0),
        backward=False,
        graphed=True,
    )


CASES = [
    sequences(2, 8192, 6144, 4),
    sequences(2, 8192, 2048, 3),
    sequences(2, 8192, 6144, 4, documents=16),
    sequences(16, 512, 768, 4),
    step(1, 6144, 4),
    step(64, 6144, 4),
]
