"""Block-selected attention of one query over a cache: score the means, then read the chosen blocks where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels.block_sparse_attention.kernels.step import block_step, block_step_merge, block_step_scores
from archsearch_kernels.block_sparse_attention.shapes import padded, roles, rows_in_order, strides

PROGRAMS = 264  # two for each multiprocessor of an H100: below, a query's blocks are shared out


@torch.library.custom_op(
    "archsearch::block_sparse_attention_step",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor means, int block_size, int top_k, float scale, bool per_group)"
    " -> Tensor",
)
def attend_step(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, block_size: int, top_k: int, scale: float, per_group: bool
) -> Tensor:
    """Output [B, 1, H, V] for q [B, 1, H, D]. No gradient. Arguments as `block_sparse_attention`'s, already checked."""
    q, k, v, means = rows_in_order(q), rows_in_order(k), rows_in_order(v), rows_in_order(means)
    (B, _, H, D), (S, G, V), N = q.shape, v.shape[1:], means.shape[1]
    selectors, R, per_keys = roles(H, G, per_group)
    out = torch.empty((B, 1, H, V), dtype=v.dtype, device=q.device)
    scores = torch.empty((B, selectors, N), dtype=torch.float32, device=q.device)
    shares = max(1, min(top_k, -(-PROGRAMS // (B * selectors))))
    parts = torch.empty((B * H, shares, V), dtype=torch.float32, device=q.device) if shares > 1 else out
    peaks = torch.empty((B * H, shares), dtype=torch.float32, device=q.device)
    q_at = {"q_b": q.stride(0), "q_h": q.stride(2)}
    shared = {"N": N, "SELECTORS": selectors, "PER_KEYS": per_keys, **q_at, "R": R, "D": D, "BD": padded(D)}
    sizes = {"N": N, "HEADS": B * selectors}
    block_step_scores.launch(
        lambda c: (-(-N // c["BN"]), B * selectors),
        {
            "q": q, "means": means, "scores": scores, **shared,
            "m_b": means.stride(0), "m_n": means.stride(1), "m_h": means.stride(2),
        },
        sizes=sizes,
    )  # fmt: skip
    block_step.launch(
        lambda c: (shares, B * selectors),
        {
            "q": q, "k": k, "v": v, "scores": scores, "parts": parts, "peaks": peaks, **shared, "S": S,
            "top_k": top_k, "scale": scale, **strides("k", k), **strides("v", v), "C": block_size, "RP": padded(R),
            "V": V, "BV": padded(V), "NP": padded(N + 1), "SHARES": shares,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        },
        sizes=sizes,
    )  # fmt: skip
    if shares > 1:
        block_step_merge.launch(
            lambda c: (B * H,),
            {
                "parts": parts, "peaks": peaks, "out": out, "SHARES": shares, "SP": padded(shares),
                "V": V, "BV": padded(V),
            },
            sizes=sizes,
        )  # fmt: skip
    return out


@attend_step.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, block_size: int, top_k: int, scale: float, per_group: bool
) -> Tensor:
    return v.new_empty((q.shape[0], 1, q.shape[2], v.shape[3]))
