"""Gated linear attention: training at two lengths, and the decode step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from case import Case, Inputs

from archsearch_kernels.gla import gla, gla_step


def sequences(B: int, T: int, H: int, K: int, V: int) -> Inputs:
    """q, k, v and gates as in fla's own benchmark: the logarithm of a sigmoid."""
    q, k = (torch.randn(B, T, H, K, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    v = torch.randn(B, T, H, V, device="cuda", dtype=torch.bfloat16).requires_grad_()
    g = F.logsigmoid(torch.randn(B, T, H, K, device="cuda")).bfloat16().requires_grad_()
    return {"q": q, "k": k, "v": v, "g": g}


def tokens(B: int, H: int, K: int, V: int) -> Inputs:
    """One token of every sequence and the states."""
    one = {name: x.detach()[:, 0].contiguous() for name, x in sequences(B, 1, H, K, V).items()}
    return {**one, "state": torch.randn(B, H, K, V, device="cuda")}


def fla_chunk(q: Any, k: Any, v: Any, g: Any) -> Any:
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, g)


def fla_step(q: Any, k: Any, v: Any, g: Any, state: Any) -> Any:
    from fla.ops.gla import fused_recurrent_gla

    q, k, v, g = (x[:, None] for x in (q, k, v, g))
    o, final = fused_recurrent_gla(q, k, v, gk=g, initial_state=state, output_final_state=True)
    return o[:, 0], final


def training(B: int, T: int, H: int = 16, K: int = 128, V: int = 128) -> Case:
    n, C = B * T * H, 64
    return Case(
        op="gla",
        shape=f"B{B} T{T} H{H} K{K} V{V}",
        inputs=partial(sequences, B, T, H, K, V),
        run=gla,
        reference=partial(gla, implementation="reference"),
        small=partial(sequences, 1, 321, 2, K, V),
        peers={"fla": fla_chunk},
        flops=(n * (2.0 * C * (K + V) + 4 * K * V), n * (2.0 * C * (4 * K + 3 * V) + 14 * K * V)),
        bytes=(n * (6.0 * K + 4 * V), n * (18.0 * K + 10 * V)),
        against="fla",
        goal=0.6,
    )


def decoding(B: int, H: int = 16, K: int = 128, V: int = 128) -> Case:
    return Case(
        op="gla_step",
        shape=f"B{B} H{H} K{K} V{V}",
        inputs=partial(tokens, B, H, K, V),
        run=partial(gla_step, inplace=True),
        reference=lambda state, **given: gla_step(**given, state=state.clone(), implementation="reference"),
        small=partial(tokens, 2, 2, K, V),
        peers={"fla": fla_step},
        flops=(B * H * 5.0 * K * V, 0.0),
        bytes=(B * H * (8.0 * K * V + 6 * K + 4 * V), 0.0),
        backward=False,
        graphed=True,
        against="fla",
        goal=1.0,
    )


CASES: list[Case] = [training(2, 8192), training(8, 2048), decoding(1), decoding(64)]
