"""Linear attention with one decay per head: RetNet, simple GLA, the SSD of Mamba-2, and decode steps."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, Inputs
from torch import Tensor

from archsearch_kernels.scalar_decay import reference, scalar_decay, scalar_decay_step, ssd_step


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def make(B: int, T: int, H: int, G: int, K: int, V: int, fixed: bool) -> Inputs:
    """RetNet's decays, or ones like those of an initialised Mamba-2 or simple GLA."""
    torch.manual_seed(0)
    if fixed:
        g = torch.log1p(-torch.exp2(-5 - torch.arange(H, device="cuda", dtype=torch.float32)))
    else:
        g = torch.nn.functional.logsigmoid(normal(B, T, H, dtype=torch.float32)).div_(16).requires_grad_()
    q, k = (normal(B, T, G, K).requires_grad_() for _ in range(2))
    return {"q": q, "k": k, "v": normal(B, T, H, V).requires_grad_(), "g": g}


def retention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Any:
    from fla.ops.retention import chunk_retention

    return chunk_retention(q, k, v)


def simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Any:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g)


def chunks(name: str, B: int, T: int, H: int, G: int, K: int, V: int, fixed: bool = False) -> Case:
    tokens, C = B * T, 64
    forward = 2 * tokens * (G * C * K / 2 + H * (C * V / 2 + 2 * K * V))
    keys, values = 2 * tokens * G * K, 2 * tokens * H * V  # bytes of q or k, of v or o
    decays = 0 if fixed else 4 * tokens * H
    peers = {} if G != H else {"fla chunk_retention": retention} if fixed else {"fla chunk_simple_gla": simple_gla}
    return Case(
        op="scalar_decay",
        shape=f"{name} B{B} T{T} H{H} G{G} K{K} V{V}",
        inputs=lambda: make(B, T, H, G, K, V, fixed),
        run=scalar_decay,
        reference=reference.scalar_decay,
        small=lambda: make(1, 300, H, G, K, V, fixed),
        peers=peers,
        flops=(forward, 3.5 * forward),
        bytes=(2 * keys + 2 * values + decays, 6 * keys + 5 * values + 3 * decays),
        against="fla chunk_retention" if fixed else None,
        goal=0.7 if fixed else None,
    )


def step(B: int, H: int, K: int, V: int) -> Case:
    def inputs() -> Inputs:
        torch.manual_seed(0)
        state = normal(B, H, K, V, dtype=torch.float32)
        g = normal(B, H, dtype=torch.float32).abs().neg()
        return {"q": normal(B, H, K), "k": normal(B, H, K), "v": normal(B, H, V), "g": g, "state": state}

    moved = 8.0 * B * H * K * V + 2 * B * H * (2 * K + 2 * V)
    return Case(
        op="scalar_decay_step",
        shape=f"B{B} H{H} K{K} V{V}",
        inputs=inputs,
        run=lambda **given: scalar_decay_step(**given, inplace=True),
        reference=lambda state, **given: reference.scalar_decay_step(**given, state=state.clone()),
        small=inputs,
        flops=(4.0 * B * H * K * V, 0.0),
        bytes=(moved, 0.0),
        backward=False,
        graphed=True,
    )


def ssd(B: int, H: int, N: int, P: int) -> Case:
    """A token of Mamba-2 as its projections give it."""

    def inputs() -> Inputs:
        torch.manual_seed(0)
        per_head = {name: normal(H) for name in ("A_log", "dt_bias", "D")}
        groups = {"C": normal(B, 1, N), "B": normal(B, 1, N), "u": normal(B, H, P), "dt": normal(B, H)}
        return {**groups, **per_head, "state": normal(B, H, N, P, dtype=torch.float32)}

    return Case(
        op="ssd_step",
        shape=f"B{B} H{H} N{N} P{P}",
        inputs=inputs,
        run=lambda **given: ssd_step(**given, inplace=True),
        reference=lambda state, **given: reference.ssd_step(**given, state=state.clone()),
        small=inputs,
        flops=(4.0 * B * H * N * P, 0.0),
        bytes=(8.0 * B * H * N * P + 2 * B * (2 * N + 2 * H * P), 0.0),
        backward=False,
        graphed=True,
    )


CASES = [
    chunks("RetNet", 2, 8192, 16, 16, 128, 128, fixed=True),
    chunks("RetNet", 8, 2048, 16, 16, 128, 128, fixed=True),
    chunks("simple GLA", 2, 8192, 16, 16, 128, 128),
    chunks("SSD", 1, 8192, 64, 1, 128, 64),
    step(1, 16, 128, 128),
    step(64, 16, 128, 128),
    ssd(1, 64, 128, 64),
    ssd(64, 64, 128, 64),
]
