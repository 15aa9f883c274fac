"""Attention over chosen blocks: each query reads its own block and the past blocks whose mean key fits it best."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels import dispatch
from archsearch_kernels.attention import attention
from archsearch_kernels.block_sparse_attention import reference as _reference
from archsearch_kernels.block_sparse_attention.reference import (
    block_sparse_attention_recurrent as block_sparse_attention_recurrent,
)
from archsearch_kernels.eager import direct
from archsearch_kernels.packing import seq_idx_of

OP = "block_sparse_attention"
TYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256  # head that the kernels take
BLOCK_SIZES = (16, 32, 64, 128, 256, 512)
MOST_BLOCKS = 2048
MOST_CHOSEN = 64
MOST_HEADS = 64  # that share a key head
MOST_TOKENS = 2**19


def block_means(k: Tensor, block_size: int, *, implementation: str | None = None) -> Tensor:
    """Mean key, in float32 or wider, of each full block of k [B, S, G, D] that a token may look back on.

    Returns [B, N, G, D] with N = (S - 1) // block_size: the last token's own block is none of them, even when full.
    It has no gradient. Raises ValueError for a shape of another rank.
    """
    if k.dim() != 4 or block_size < 1:
        raise ValueError(f"{OP}: k is {tuple(k.shape)}, block_size {block_size}; expected [B, S, G, D] and at least 1")
    unsupported = f"k is {k.dtype}" if k.dtype not in TYPES else None
    if k.shape[3] > WIDEST:
        unsupported = f"heads are {k.shape[3]} wide, above {WIDEST}"
    if not dispatch.runs_kernel(OP, k, unsupported, implementation):
        return _reference.block_means(k, block_size)
    from archsearch_kernels.block_sparse_attention import selection

    return direct(selection.block_means, k.detach(), block_size)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    means: Tensor | None = None,
    scale: float | None = None,
    seq_idx: Tensor | None = None,
    per_group: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Block-selected attention of the last T positions over S keys (MoBA, 2502.13189).

    q [B, T, H, D], k [B, S, G, D], v [B, S, G, V] with H a multiple of G and T <= S; all may be strided views.
    `top_k` counts the own block. `means`: block_means(k, block_size), if they are at hand. `seq_idx` [B, T] integers
    that number packed documents, or their running lengths `cu_seqlens` [N + 1] with B = 1, either only with T = S:
    every document has blocks of its own, counted from its first token. `per_group`: the query heads that share a key
    head choose together, by the sum of their scores, as in NSA's selected branch (2502.11089). Of equal scores the
    kernels take the lower block. The choice has no gradient. Returns [B, T, H, V] in v's dtype.

    The kernels take blocks of 16 to 512 keys (powers of two), at most 2048 of them, heads up to 256 wide (128 in
    float32), top_k up to 64, float16, bfloat16 and float32. Raises ValueError for shapes that do not fit together.
    """
    _check(q, k, v, block_size, top_k, means, seq_idx, cu_seqlens)
    T, S = q.shape[1], k.shape[1]
    if cu_seqlens is not None:
        seq_idx = seq_idx_of(cu_seqlens, T)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if top_k >= -(-S // block_size):  # every block: full attention
        asked = "reference" if implementation == "reference" else None
        return attention(q, k, v, scale=scale, seq_idx=seq_idx, implementation=asked)
    if not dispatch.runs_kernel(OP, q, _unsupported(q, k, v, block_size, top_k), implementation):
        return _reference.block_sparse_attention(
            q,
            k,
            v,
            block_size=block_size,
            top_k=top_k,
            means=means,
            scale=scale,
            seq_idx=seq_idx,
            per_group=per_group,
        )
    if torch.is_autocast_enabled(q.device.type):  # as torch's own attention does
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if means is not None:
        means = means.detach().float()
    if T == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        from archsearch_kernels.block_sparse_attention import step

        means = block_means(k, block_size) if means is None else means
        return direct(step.attend_step, q, k, v, means, block_size, top_k, scale, per_group)
    from archsearch_kernels.block_sparse_attention import parallel

    return parallel.attend(q, k, v, means, block_size, top_k, scale, per_group, seq_idx)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    top_k: int,
    means: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"{OP}: {name} is {x.dtype} {tuple(x.shape)}; expected four dimensions of floats")
        if x.device != q.device:
            raise ValueError(f"{OP}: {name} is on {x.device}, q on {q.device}; expected one device")
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"{OP}: k is {tuple(k.shape)}; expected [{B}, S, G, {D}] for q {tuple(q.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{OP}: v is {tuple(v.shape)}; expected [{B}, {S}, {G}, V] for k {tuple(k.shape)}")
    if G == 0 or H % G:
        raise ValueError(f"{OP}: q has {H} heads, k has {G}; expected a multiple")
    if not 0 < T <= S:
        raise ValueError(f"{OP}: q has {T} positions, k has {S}; expected 1 to {S}")
    if block_size < 1 or top_k < 1:
        raise ValueError(f"{OP}: block_size is {block_size}, top_k {top_k}; expected at least 1 of each")
    if means is not None and (means.shape != (B, (S - 1) // block_size, G, D) or means.device != q.device):
        raise ValueError(
            f"{OP}: means is {tuple(means.shape)} on {means.device}; "
            f"expected [{B}, {(S - 1) // block_size}, {G}, {D}] on {q.device}"
        )
    if seq_idx is not None and (T != S or seq_idx.shape != (B, T) or seq_idx.is_floating_point()):
        found = f"{seq_idx.dtype} {tuple(seq_idx.shape)} with {S} keys"
        raise ValueError(f"{OP}: seq_idx is {found}; expected integers [{B}, {T}] and as many keys")
    if cu_seqlens is not None and (B != 1 or T != S or seq_idx is not None):
        found = f"B = {B}, {T} queries, {S} keys" + (" and seq_idx" if seq_idx is not None else "")
        raise ValueError(f"{OP}: cu_seqlens with {found}; expected B = 1, as many queries as keys, no seq_idx")


def _unsupported(q: Tensor, k: Tensor, v: Tensor, block_size: int, top_k: int) -> str | None:
    (B, T, H, D), (S, G, V) = q.shape, v.shape[1:]
    if not torch.is_autocast_enabled(q.device.type):
        if q.dtype not in TYPES:
            return f"q is {q.dtype}"
        if not q.dtype == k.dtype == v.dtype:
            return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
    if block_size not in BLOCK_SIZES:
        return f"blocks have {block_size} keys, not one of {BLOCK_SIZES}"
    if max(D, V) > WIDEST:
        return f"heads are {D} and {V} wide, above {WIDEST}"
    if max(D, V) > WIDEST // 2 and q.dtype == torch.float32:
        return f"heads are {D} and {V} wide, above {WIDEST // 2}, in float32"
    if -(-S // block_size) > MOST_BLOCKS:
        return f"there are {-(-S // block_size)} blocks, above {MOST_BLOCKS}"
    if top_k > MOST_CHOSEN:
        return f"top_k is {top_k}, above {MOST_CHOSEN}"
    if H // G > MOST_HEADS:
        return f"{H // G} heads share their keys, above {MOST_HEADS}"
    if T > MOST_TOKENS:
        return f"there are {T} queries, above {MOST_TOKENS}"
    if B * T * H * top_k >= 2**31 - 2**20:  # a last tile reaches beyond
        return f"there are {B * T * H * top_k} pairs of query and block, above 2^31"
    return None
