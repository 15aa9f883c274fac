"""The delta rule, plain and gated: training shapes against fla's chunked kernels, and one token against the bytes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from case import Case, Inputs
from torch import Tensor

from archsearch_kernels.delta_rule import delta_rule, delta_rule_step, projected_delta_rule_step, reference

CHUNK = 64


def inputs(B: int, T: int, H: int, G: int, D: int, gated: bool) -> Inputs:
    """bf16, unit keys, steps in (0, 1), log decays of log-sigmoids."""
    made = {"dtype": torch.bfloat16, "device": "cuda"}
    x: Inputs = {
        "q": F.normalize(torch.randn(B, T, G, D, device="cuda"), dim=-1).bfloat16(),
        "k": F.normalize(torch.randn(B, T, G, D, device="cuda"), dim=-1).bfloat16(),
        "v": torch.randn(B, T, H, D, **made),  # type: ignore[arg-type]
        "beta": torch.rand(B, T, H, **made),  # type: ignore[arg-type]
    }
    if gated:
        x["g"] = F.logsigmoid(torch.randn(B, T, H, device="cuda"))
    return {name: t.requires_grad_() for name, t in x.items()}


def token(B: int, H: int, D: int, gated: bool) -> Inputs:
    x = {name: t.detach()[:, 0].contiguous() for name, t in inputs(B, 1, H, H, D, gated).items()}
    x.setdefault("g", None)  # type: ignore[arg-type]
    return {**x, "state": torch.randn(B, H, D, D, device="cuda")}


def run(**x: Any) -> tuple[Tensor, Tensor]:
    return delta_rule(**x, implementation="triton")


def chunks_reference(**x: Any) -> tuple[Tensor, Tensor]:
    return delta_rule(**x, implementation="reference")


def step(**x: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return delta_rule_step(**x, implementation="triton")


def step_reference(**x: Any) -> tuple[Tensor, Tensor]:
    return delta_rule_step(**x, implementation="reference")


def fla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
    if g is None:
        from fla.ops.delta_rule import chunk_delta_rule

        return chunk_delta_rule(q, k, v, beta)[0]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g, beta)[0]


def fla_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor | None]:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    row = {"q": q, "k": k, "v": v, "beta": beta, "g": g}
    row = {name: x if x is None else x[:, None] for name, x in row.items()}
    o, last = fused_recurrent_gated_delta_rule(**row, initial_state=state, output_final_state=True)
    return o[:, 0], last


def case(B: int, T: int, H: int, G: int, D: int, gated: bool, goal: float | None = None) -> Case:
    n = B * T * H  # tokens times value heads
    keys = 2 * G / H  # q and k
    heads = f"H{H}" if G == H else f"H{H}/{G}"
    flops = n * (CHUNK * 10 * D + CHUNK**2 + 6 * D * D)
    gate = 4.0 if gated else 0.0
    return Case(
        op="gated_delta_rule" if gated else "delta_rule",
        shape=f"B{B} T{T} {heads} D{D}",
        inputs=partial(inputs, B, T, H, G, D, gated),
        run=run,
        reference=chunks_reference,
        small=partial(inputs, 2, 300, H // 4, G // 4, D, gated),
        peers={"fla": fla},
        flops=(flops, 3.5 * flops),
        bytes=(n * (2 * D * (keys + 2) + 2 + gate), n * (2 * D * (3 * keys + 5) + 3 * (2 + gate))),
        against="fla",
        goal=goal,
    )


def decode(B: int, gated: bool, H: int = 16, D: int = 128) -> Case:
    return Case(
        op="gated_delta_rule_step" if gated else "delta_rule_step",
        shape=f"B{B} H{H} D{D}",
        inputs=partial(token, B, H, D, gated),
        run=step,
        reference=step_reference,
        small=partial(token, 2, H, D, gated),
        peers={"fla": fla_step},
        flops=(6.0 * B * H * D * D, 0.0),
        bytes=(8.0 * B * H * D * D + B * H * 8 * D, 0.0),
        backward=False,
        graphed=True,
    )


def projections(B: int, H: int, D: int) -> Inputs:
    """A token of Gated DeltaNet as its projections give it, bf16 but for the state."""
    x = {name: t.detach()[:, 0].contiguous() for name, t in inputs(B, 1, H, H, D, False).items()}
    of_heads = {name: torch.randn(H, device="cuda", dtype=torch.bfloat16) for name in ("A_log", "dt_bias")}
    decay = torch.randn(B, H, device="cuda", dtype=torch.bfloat16)
    return {**x, "decay": decay, **of_heads, "state": torch.randn(B, H, D, D, device="cuda")}


def projected(B: int, H: int = 16, D: int = 128) -> Case:
    return Case(
        op="projected_delta_rule_step",
        shape=f"B{B} H{H} D{D}",
        inputs=partial(projections, B, H, D),
        run=partial(projected_delta_rule_step, inplace=True),
        reference=lambda state, **given: reference.projected_delta_rule_step(**given, state=state.clone()),
        small=partial(projections, 2, H, D),
        flops=(6.0 * B * H * D * D, 0.0),
        bytes=(8.0 * B * H * D * D + B * H * 8 * D, 0.0),
        backward=False,
        graphed=True,
    )


CASES = [
    case(2, 8192, 16, 16, 128, False, goal=0.8),
    case(2, 8192, 16, 16, 128, True, goal=0.8),
    case(1, 8192, 32, 16, 128, True),
    case(8, 2048, 16, 16, 128, False),
    case(8, 2048, 16, 16, 128, True),
    decode(1, True),
    decode(64, True),
    decode(64, False),
    projected(1),
    projected(64),
]
