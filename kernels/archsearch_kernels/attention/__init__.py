"""Causal softmax attention: grouped queries, sliding window, learned sink, packed documents."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from archsearch_kernels import dispatch
from archsearch_kernels.attention import choice
from archsearch_kernels.attention import reference as _reference
from archsearch_kernels.attention.reference import attention_recurrent as attention_recurrent
from archsearch_kernels.packing import seq_idx_of

WIDEST, WIDEST_FLOAT32 = 256, 128  # heads that the kernels take
TYPES = (torch.float32, torch.float16, torch.bfloat16)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    seq_idx: Tensor | None = None,
    return_lse: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    seq_idx: Tensor | None = None,
    return_lse: Literal[True],
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    seq_idx: Tensor | None = None,
    return_lse: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the last T positions over S keys (Vaswani et al. 2017; FlashAttention-2, 2307.08691).

    q [B, T, H, D], k [B, S, G, D], v [B, S, G, V] with H a multiple of G and T <= S; all may be strided views.
    `window` in tokens, itself included; `sink` [H] logits in the softmax's denominator; `scale` of the logits,
    D ** -0.5 unless given; `seq_idx` [B, T] integers that number packed documents, or their running lengths
    `cu_seqlens` [N + 1] with B = 1, either only with T = S. Returns [B, T, H, V] in v's dtype and, with
    `return_lse`, the logarithm of the softmax's denominator [B, T, H] in float32, the sink included.

    The kernels take heads up to 256 wide in float16 and bfloat16, 128 in float32. `implementation` is `triton`,
    `reference` or `auto`, which also runs torch's own kernel where that was measured to be faster. Raises ValueError
    for shapes that do not fit together.
    """
    _check(q, k, v, window, sink, seq_idx, cu_seqlens)
    _, T, H, D = q.shape
    if cu_seqlens is not None:
        seq_idx = seq_idx_of(cu_seqlens, T)
    scale = D**-0.5 if scale is None else scale
    if not dispatch.runs_kernel("attention", q, _unsupported(q, k, v, scale), implementation):
        return _reference.attention(
            q, k, v, window=window, sink=sink, scale=scale, seq_idx=seq_idx, return_lse=return_lse
        )
    if torch.is_autocast_enabled(q.device.type):  # as torch's own attention does
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if window is not None and k.shape[1] > T + window - 1:  # keys that no query sees
        k, v = k[:, -(T + window - 1) :], v[:, -(T + window - 1) :]
    S = k.shape[1]
    if window is not None and window >= S:
        window = None
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sink))
    if T == S and T > 1 and dispatch.asked(implementation) == "auto":
        plain = sink is None and seq_idx is None and v.shape[3] == D and not return_lse and q.device.type == "cuda"
        gpu = choice.gpu_name(q.device)
        if choice.choice(gpu, T, D, H // k.shape[2], window, q.dtype, gradient, plain) == "sdpa":
            return choice.sdpa(q, k, v, scale)
    if T == 1 and not gradient:
        from archsearch_kernels.attention.step import attention_step

        o, lse = attention_step(q, k, v, sink, scale)
    else:
        from archsearch_kernels.attention.parallel import attention_parallel

        o, lse = attention_parallel(q, k, v, sink, seq_idx if T > 1 else None, window, scale)
    return (o, lse.transpose(1, 2)) if return_lse else o


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    sink: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"attention: {name} is {x.dtype} {tuple(x.shape)}; expected four dimensions of floats")
        if x.device != q.device:
            raise ValueError(f"attention: {name} is on {x.device}, q on {q.device}; expected one device")
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"attention: k is {tuple(k.shape)}; expected [{B}, S, G, {D}] for q {tuple(q.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"attention: v is {tuple(v.shape)}; expected [{B}, {S}, {G}, V] for k {tuple(k.shape)}")
    if G == 0 or H % G:
        raise ValueError(f"attention: q has {H} heads, k has {G}; expected a multiple")
    if not 0 < T <= S:
        raise ValueError(f"attention: q has {T} positions, k has {S}; expected 1 to {S}")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; expected at least 1, the token itself")
    if sink is not None and (sink.shape != (H,) or sink.device != q.device):
        raise ValueError(f"attention: sink is {tuple(sink.shape)} on {sink.device}; expected [{H}] on {q.device}")
    if seq_idx is not None and (T != S or seq_idx.shape != (B, T) or seq_idx.is_floating_point()):
        found = f"{seq_idx.dtype} {tuple(seq_idx.shape)} with {S} keys"
        raise ValueError(f"attention: seq_idx is {found}; expected integers [{B}, {T}] and as many keys")
    if cu_seqlens is not None and (B != 1 or T != S or seq_idx is not None):
        found = f"B = {B}, {T} queries, {S} keys" + (" and seq_idx" if seq_idx is not None else "")
        raise ValueError(f"attention: cu_seqlens with {found}; expected B = 1, as many queries as keys, no seq_idx")


def _unsupported(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    if q.dtype not in TYPES:
        return f"q is {q.dtype}"
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
    widest = WIDEST if _computed_in(q).itemsize == 2 else WIDEST_FLOAT32
    if max(q.shape[3], v.shape[3]) > widest:
        return f"heads are {q.shape[3]} and {v.shape[3]} wide, above {widest} for {_computed_in(q)}"
    if not scale > 0:
        return f"the scale is {scale}"
    return None


def _computed_in(q: Tensor) -> torch.dtype:
    device = q.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
