"""RoPE of queries, and of queries and keys at once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from case import Case, Inputs
from torch import Tensor

from archsearch_kernels.rope import reference, rope, rope_qk

THETA = 10_000.0


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


@cache
def table(T: int, D: int) -> tuple[Tensor, Tensor]:
    frequency = THETA ** (-torch.arange(D // 2, device="cuda", dtype=torch.float32) / (D // 2))
    angle = torch.arange(T, device="cuda")[:, None] * frequency.repeat(2)
    return angle.cos().bfloat16()[None], angle.sin().bfloat16()[None]


def liger(q: Tensor, k: Tensor) -> Any:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    cos, sin = table(q.shape[1], q.shape[3])
    q, k = liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def fla(x: Tensor) -> Any:
    from fla.modules.rotary import rotary_embedding

    cos, sin = table(x.shape[1], x.shape[3])
    half = x.shape[3] // 2
    return rotary_embedding(x, cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())


def case(B: int, T: int, H: int, D: int, n_dims: int | None = None, keys: int = 0) -> Case:
    def make(tokens: int) -> Inputs:
        torch.manual_seed(0)
        if keys:
            return {"q": normal(B, tokens, H, D), "k": normal(B, tokens, keys, D)}
        return {"x": normal(B, tokens, H, D)}

    n = n_dims or D
    ours, theirs = (rope_qk, reference.rope_qk) if keys else (rope, reference.rope)
    options = {"position": 0, "theta": THETA, "n_dims": n}
    peers: dict[str, Any] = {"torch": lambda **given: theirs(**given, **options)}
    if n == D:
        peers |= {"Liger": liger} if keys else {"fla": fla}
    queries = 4.0 * B * T * H * D  # bytes of q, and of q rotated; only theirs flow back
    moved = queries * (1 + keys / H)
    return Case(
        op="rope",
        shape=f"B{B} T{T} H{H}" + (f"+{keys}" if keys else "") + f" D{D}" + (f" of which {n}" if n < D else ""),
        inputs=lambda: make(T),
        run=lambda **given: ours(**given, **options),
        reference=lambda **given: theirs(**given, **options),
        small=lambda: make(301),
        peers=peers,
        bytes=(moved, moved + queries),
        against="torch",
        goal=0.5,
    )


CASES = [
    case(2, 8192, 16, 128),
    case(2, 8192, 16, 128, keys=4),
    case(2, 8192, 16, 256, n_dims=64, keys=2),
    case(16, 512, 4, 64, keys=4),
]
