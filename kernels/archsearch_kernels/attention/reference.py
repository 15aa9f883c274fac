"""Causal softmax attention (Vaswani et al. 2017) with GQA (2305.13245), sliding window and learned sink (gpt-oss).

Queries are the last T of S positions, so one function serves training (T = S), chunked prefill and decode (T = 1).
A window of w lets a token see itself and the w - 1 before it. A learned sink adds exp(sink_h) to the softmax's
denominator and nothing to its numerator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    seq_idx: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The truth: one query at a time over an explicit softmax. Shapes as in `attention`."""
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(H // G, dim=2)  # [B, S, H, D]
    v = v.repeat_interleave(H // G, dim=2)
    rows, sums = [], []
    for t in range(S - T, S):
        first = 0 if window is None else max(0, t - window + 1)
        logits = torch.einsum("bhd,bshd->bhs", q[:, t - S + T], k[:, first : t + 1]).to(wide) * scale
        if seq_idx is not None:
            other = seq_idx[:, first : t + 1] != seq_idx[:, t : t + 1]  # [B, S']
            logits = logits.masked_fill(other[:, None], float("-inf"))
        if sink is not None:
            logits = torch.cat([logits, sink.to(wide).view(1, H, 1).expand(B, H, 1)], dim=-1)
        sums.append(logits.logsumexp(-1))
        weights = logits.softmax(-1)[..., : t + 1 - first].to(v.dtype)
        rows.append(torch.einsum("bhs,bshv->bhv", weights, v[:, first : t + 1]))
    out = torch.stack(rows, dim=1)
    return (out, torch.stack(sums, dim=1)) if return_lse else out


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the last T positions over S keys.

    q [B, T, H, D], k [B, S, G, D], v [B, S, G, V] with H a multiple of G and T <= S; `window` in tokens, itself
    included; `sink` [H] logits; `seq_idx` [B, T] only with T = S. Returns [B, T, H, V] in v's dtype; `return_lse`
    adds the logarithm of the softmax's denominator [B, T, H] in float32, at the price of every logit in memory.
    """
    out = _attention(q, k, v, window, sink, scale, seq_idx)
    return (out, _log_sum_exp(q, k, window, sink, scale, seq_idx)) if return_lse else out


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    sink: Tensor | None,
    scale: float | None,
    seq_idx: Tensor | None,
) -> Tensor:
    T, D = q.shape[1], q.shape[3]
    scale = D**-0.5 if scale is None else scale
    if window is not None and k.shape[1] > T + window - 1:  # keys that no query sees
        k, v = k[:, -(T + window - 1) :], v[:, -(T + window - 1) :]
    S = k.shape[1]
    if window is not None and window >= S:
        window = None
    if T == 1:  # every key that is left is seen
        return _sdpa(q, k, v, scale) if sink is None else _one_query_with_sink(q, k, v, sink, scale)
    if sink is not None:
        q, k, v = _with_sink(q, k, v, sink, scale)
    if window is not None and T == S and 2 * window <= S:
        return _banded(q, k, v, window, scale, sink is not None, seq_idx)
    if T == S and window is None and seq_idx is None:
        if sink is None:
            return _sdpa(q, k, v, scale, causal=True)
        # one idle query in front lines the diagonal up with the sink's extra key
        return _sdpa(F.pad(q, (0, 0, 0, 0, 1, 0)), k, v, scale, causal=True)[:, 1:]
    at = torch.arange(S - T, S, device=q.device)[:, None]
    key = torch.arange(S, device=q.device)[None]
    seen = key <= at  # [T, S]
    if window is not None:
        seen &= key > at - window
    if seq_idx is not None:
        seen = (seen & (seq_idx[:, :, None] == seq_idx[:, None, :]))[:, None]  # [B, 1, T, S]
    if sink is not None:
        seen = F.pad(seen, (1, 0), value=True)
    return _sdpa(q, k, v, scale, seen=seen)


def _log_sum_exp(
    q: Tensor, k: Tensor, window: int | None, sink: Tensor | None, scale: float | None, seq_idx: Tensor | None
) -> Tensor:
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(H // G, dim=2)
    logits = torch.einsum("bthd,bshd->bths", q.to(wide), k.to(wide)) * (D**-0.5 if scale is None else scale)
    at = torch.arange(S - T, S, device=q.device)[:, None]
    key = torch.arange(S, device=q.device)[None]
    seen = (key <= at)[None]  # [1, T, S]
    if window is not None:
        seen = seen & (key > at - window)
    if seq_idx is not None:
        seen = seen & (seq_idx[:, :, None] == seq_idx[:, None, :])
    logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    if sink is not None:
        logits = torch.cat([logits, sink.to(wide).view(1, 1, H, 1).expand(B, T, H, 1)], dim=-1)
    return logits.logsumexp(-1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None = None, causal: bool = False) -> Tensor:
    K, V = k.shape[-1], v.shape[-1]
    if K != V:  # the fused kernels want one width; falling off them costs 4x on the CPU
        q, k, v = (F.pad(x, (0, max(K, V) - x.shape[-1])) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)[..., :V]


def _one_query_with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, scale: float) -> Tensor:
    """Decode: two products, so that the cache is read and never copied."""
    (B, _, H, D), G = q.shape, k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.reshape(B, G, H // G, D) @ k.permute(0, 2, 3, 1)).to(wide) * scale  # [B, G, H / G, S]
    sinks = sink.to(wide).view(1, G, H // G, 1).expand(B, -1, -1, -1)
    weights = torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1].to(v.dtype)
    return (weights @ v.transpose(1, 2)).view(B, 1, H, -1)


def _with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """A first key whose logit is the sink and whose value is zero, through 8 further features of q and k."""
    (B, T, H, _), G = q.shape, k.shape[2]
    extra = F.pad((sink / scale).to(q.dtype).view(1, 1, H, 1), (0, 7)).expand(B, T, H, 8)
    first = F.pad(k.new_ones(B, 1, G, 1), (k.shape[3], 7))
    return (
        torch.cat([q, extra], -1),
        torch.cat([first, F.pad(k, (0, 8))], 1),
        F.pad(v, (0, 0, 0, 0, 1, 0)),
    )


def _banded(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, has_sink: bool, seq_idx: Tensor | None
) -> Tensor:
    """Sliding window in blocks of w queries, each over its own block and the one before: 2w keys a query."""
    B, T, H, _ = q.shape
    n = -(-T // window)
    pad = n * window - T
    q = F.pad(q, (0, 0, 0, 0, 0, pad)).reshape(B * n, window, H, -1)

    def pairs_of_blocks(x: Tensor) -> Tensor:
        """[B, T, ...] to [B, n, 2w, ...]: the block before, then its own."""
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (window, pad)).view(B, n + 1, window, *x.shape[2:])
        return torch.cat([x[:, :-1], x[:, 1:]], dim=2)

    if has_sink:
        sinks = [x[:, None, :1].expand(B, n, 1, *x.shape[2:]) for x in (k, v)]
        k, v = k[:, 1:], v[:, 1:]
    k, v = pairs_of_blocks(k), pairs_of_blocks(v)
    if has_sink:
        k, v = (torch.cat([sink, x], dim=2) for sink, x in zip(sinks, (k, v), strict=True))
    at = torch.arange(window, 2 * window, device=q.device)[:, None]
    key = torch.arange(2 * window, device=q.device)[None]
    seen = ((key <= at) & (key > at - window)).expand(B, n, window, 2 * window)
    exists = torch.arange(n, device=q.device)[:, None, None] * window + key >= window  # not before the first token
    seen = seen & exists
    if seq_idx is not None:
        document = pairs_of_blocks(seq_idx[..., None])[..., 0]  # [B, n, 2w]
        seen = seen & (document[:, :, window:, None] == document[:, :, None, :])
    if has_sink:
        seen = F.pad(seen, (1, 0), value=True)
    out = _sdpa(q, k.flatten(0, 1), v.flatten(0, 1), scale, seen=seen.flatten(0, 1)[:, None])  # [B n, 1, w, 2w]
    return out.reshape(B, n * window, H, -1)[:, :T]
