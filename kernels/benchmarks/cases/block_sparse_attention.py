"""Block-selected attention, 16 blocks of 64 keys, against dense causal attention: training at two lengths, decode.

Queries and keys are random, which is the worst case: neighbouring queries share no blocks.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from case import Case, Inputs
from torch import Tensor

from archsearch_kernels.block_sparse_attention import block_sparse_attention, reference

BLOCK, TOP_K, D = 64, 16, 128


def inputs(B: int, T: int, S: int, H: int, G: int, gradients: bool, length: int = 0) -> Inputs:
    make = torch.Generator("cuda").manual_seed(0)

    def randn(length: int, heads: int) -> Tensor:
        x = torch.randn(B, length, heads, D, generator=make, device="cuda", dtype=torch.bfloat16)
        return x.requires_grad_(gradients)

    given: Inputs = {"q": randn(T, H), "k": randn(S, G), "v": randn(S, G)}
    if not gradients:  # a decoding model keeps the means
        given["means"] = reference.block_means(given["k"], BLOCK)
    if length:
        given["seq_idx"] = (torch.arange(T, device="cuda") // length).expand(B, T).contiguous()
    return given


def dense(q: Tensor, k: Tensor, v: Tensor, means: Tensor | None = None) -> Tensor:
    """Torch's fastest causal attention over all keys."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    one = q.shape[1] == 1
    with sdpa_kernel(backends, set_priority=True):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=not one,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return out.transpose(1, 2)


def read(T: int) -> float:
    """Keys that a query of T tokens reads, on average: its own block up to itself, and up to TOP_K - 1 past ones."""
    return sum(min(TOP_K - 1, t // BLOCK) * BLOCK + t % BLOCK + 1 for t in range(T)) / T


def training(T: int, H: int, G: int, per_group: bool, goal: float | None, length: int = 0) -> Case:
    """`length`: of packed documents; torch's attention has no form for them that is fast."""
    span = length or T
    keys = T // span * span * read(span) + (T % span * read(T % span) if T % span else 0.0)
    forward = 4.0 * H * D * keys
    once = 2.0 * T * D * (2 * H + 2 * G)
    form = "per group" if per_group else "per head"
    return Case(
        op="block_sparse_attention",
        shape=f"B1 T{T} H{H}/{G} D{D} {TOP_K}x{BLOCK} {form}" + (f", documents of {length}" if length else ""),
        inputs=partial(inputs, 1, T, T, H, G, True, length),
        run=partial(block_sparse_attention, block_size=BLOCK, top_k=TOP_K, per_group=per_group),
        reference=partial(reference.block_sparse_attention, block_size=BLOCK, top_k=TOP_K, per_group=per_group),
        small=partial(inputs, 1, 2048, 2048, 4 * H // G, 4, True, length),
        peers={} if length else {"dense": dense},
        flops=(forward, 3.5 * forward),
        bytes=(once, 3 * once),
        against=None if length else "dense",
        goal=goal,
    )


def decoding(B: int, H: int, G: int, per_group: bool) -> Case:
    S = 32768
    selectors = G if per_group else H
    chosen = 2.0 * 2 * B * selectors * TOP_K * BLOCK * D
    means = 4.0 * B * G * (S // BLOCK - 1) * D
    return Case(
        op="block_sparse_attention",
        shape=f"decode B{B} S{S} H{H}/{G} D{D} {TOP_K}x{BLOCK} {'per group' if per_group else 'per head'}",
        inputs=partial(inputs, B, 1, S, H, G, False),
        run=partial(block_sparse_attention, block_size=BLOCK, top_k=TOP_K, per_group=per_group),
        reference=partial(reference.block_sparse_attention, block_size=BLOCK, top_k=TOP_K, per_group=per_group),
        small=partial(inputs, 2, 1, 8192, H, G, False),
        peers={"dense": dense},
        bytes=(chosen + means, 0.0),
        backward=False,
        graphed=True,
        against="dense",
        goal=1.0 if B == 1 else 0.25,
    )


CASES = [
    training(8192, 16, 16, False, 1 / 2.5),
    training(32768, 16, 16, False, 1 / 6),
    training(8192, 64, 4, True, 1 / 2.5),
    training(32768, 64, 4, True, 1 / 6),
    training(8192, 16, 16, False, None, length=1500),  # each ends within a block
    training(8192, 64, 4, True, None, length=1500),
    decoding(1, 16, 16, False),
    decoding(64, 16, 16, False),
    decoding(1, 64, 4, True),
    decoding(64, 64, 4, True),
]
