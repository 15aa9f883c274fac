"""Kimi delta attention: training at two lengths, and the decode step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from case import Case, Inputs

from archsearch_kernels.kda import kda, kda_step, projected_kda_step, reference


def sequences(B: int, T: int, H: int, K: int, V: int) -> Inputs:
    """q and keys of length one, betas in (0, 1), gates as in fla's own benchmark: the logarithm of a sigmoid."""
    unit = lambda: F.normalize(torch.randn(B, T, H, K, device="cuda"), dim=-1).bfloat16().requires_grad_()  # noqa: E731
    v = torch.randn(B, T, H, V, device="cuda", dtype=torch.bfloat16).requires_grad_()
    beta = torch.rand(B, T, H, device="cuda").bfloat16().requires_grad_()
    g = F.logsigmoid(torch.randn(B, T, H, K, device="cuda")).bfloat16().requires_grad_()
    return {"q": unit(), "k": unit(), "v": v, "beta": beta, "g": g}


def tokens(B: int, H: int, K: int, V: int) -> Inputs:
    """One token of every sequence and the states."""
    one = {name: x.detach()[:, 0].contiguous() for name, x in sequences(B, 1, H, K, V).items()}
    return {**one, "state": torch.randn(B, H, K, V, device="cuda")}


def fla_chunk(q: Any, k: Any, v: Any, beta: Any, g: Any) -> Any:
    from fla.ops.kda import chunk_kda

    return chunk_kda(q, k, v, g, beta)


def fla_step(q: Any, k: Any, v: Any, beta: Any, g: Any, state: Any) -> Any:
    from fla.ops.kda import fused_recurrent_kda

    q, k, v, beta, g = (x[:, None] for x in (q, k, v, beta, g))
    o, final = fused_recurrent_kda(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)
    return o[:, 0], final


def training(B: int, T: int, H: int = 16, K: int = 128, V: int = 128) -> Case:
    n, C = B * T * H, 64
    forward = n * (C * (6.0 * K + 4 * V) + C * C + 6 * K * V)
    return Case(
        op="kda",
        shape=f"B{B} T{T} H{H} K{K} V{V}",
        inputs=partial(sequences, B, T, H, K, V),
        run=kda,
        reference=partial(kda, implementation="reference"),
        small=partial(sequences, 1, 321, 2, K, V),
        peers={"fla": fla_chunk},
        flops=(forward, 3.5 * forward),
        bytes=(n * (6.0 * K + 4 * V + 2), n * (18.0 * K + 10 * V + 6)),
        against="fla",
        goal=0.6,
    )


def decoding(B: int, H: int = 16, K: int = 128, V: int = 128) -> Case:
    return Case(
        op="kda_step",
        shape=f"B{B} H{H} K{K} V{V}",
        inputs=partial(tokens, B, H, K, V),
        run=partial(kda_step, inplace=True),
        reference=lambda state, **given: kda_step(**given, state=state.clone(), implementation="reference"),
        small=partial(tokens, 2, 2, K, V),
        peers={"fla": fla_step},
        flops=(B * H * 7.0 * K * V, 0.0),
        bytes=(B * H * (8.0 * K * V + 6 * K + 4 * V + 2), 0.0),
        backward=False,
        graphed=True,
        against="fla",
        goal=1.0,
    )


def projections(B: int, H: int, K: int, V: int) -> Inputs:
    """A token as its projections give it, bf16 but for the state."""
    x = tokens(B, H, K, V)
    x["decay"] = x.pop("g")
    of_heads = {"A_log": torch.randn(H, device="cuda"), "dt_bias": torch.randn(H * K, device="cuda")}
    return x | {name: t.bfloat16() for name, t in of_heads.items()}


def projected(B: int, H: int = 16, K: int = 128, V: int = 128) -> Case:
    return Case(
        op="projected_kda_step",
        shape=f"B{B} H{H} K{K} V{V}",
        inputs=partial(projections, B, H, K, V),
        run=partial(projected_kda_step, inplace=True),
        reference=lambda state, **given: reference.projected_kda_step(**given, state=state.clone()),
        small=partial(projections, 2, 2, K, V),
        flops=(B * H * 7.0 * K * V, 0.0),
        bytes=(B * H * (8.0 * K * V + 6 * K + 4 * V + 2), 0.0),
        backward=False,
        graphed=True,
    )


CASES: list[Case] = [training(2, 8192), training(8, 2048), decoding(1), decoding(64), projected(1), projected(64)]
