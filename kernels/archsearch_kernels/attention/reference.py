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
) -> Tensor:
    """The truth: one query at a time over an explicit softmax. Shapes as in `attention`."""
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    k = k.repeat_interleave(H // G, dim=2)  # [B, S, H, D]
    v = v.repeat_interleave(H // G, dim=2)
    rows = []
    for t in range(S - T, S):
        first = 0 if window is None else max(0, t - window + 1)
        logits = torch.einsum("bhd,bshd->bhs", q[:, t - S + T], k[:, first : t + 1]).float() * scale
        if seq_idx is not None:
            other = seq_idx[:, first : t + 1] != seq_idx[:, t : t + 1]  # [B, S']
            logits = logits.masked_fill(other[:, None], float("-inf"))
        if sink is not None:
            logits = torch.cat([logits, sink.float().view(1, H, 1).expand(B, H, 1)], dim=-1)
        weights = logits.softmax(-1)[..., : t + 1 - first].to(v.dtype)
        rows.append(torch.einsum("bhs,bshv->bhv", weights, v[:, first : t + 1]))
    return torch.stack(rows, dim=1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T positions over S keys.

    q [B, T, H, D], k [B, S, G, D], v [B, S, G, V] with H a multiple of G and T <= S; `window` in tokens, itself
    included; `sink` [H] logits; `seq_idx` [B, T] only with T = S. Returns [B, T, H, V] in v's dtype.
    """
    T, D, S = q.shape[1], q.shape[3], k.shape[1]
    scale = D**-0.5 if scale is None else scale
    if sink is not None:
        q, k, v = _with_sink(q, k, v, sink, scale)
    if window is not None and window >= S:
        window = None
    if window is not None and T == S and seq_idx is None and 2 * window <= S:
        return _banded(q, k, v, window, scale, sink is not None)
    if T == S and window is None and sink is None and seq_idx is None:
        return _sdpa(q, k, v, scale, causal=True)
    if T == 1 and window is None:
        return _sdpa(q, k, v, scale)
    at = torch.arange(S - T, S, device=q.device)[:, None]
    key = torch.arange(S, device=q.device)[None]
    seen = key <= at  # [T, S]
    if window is not None:
        seen &= key > at - window
    if seq_idx is not None:
        seen = seen & (seq_idx[:, :, None] == seq_idx[:, None, :])  # [B, T, S]
    if sink is not None:
        seen = F.pad(seen, (1, 0), value=True)
    return _sdpa(q, k, v, scale, seen=seen if seen.dim() == 2 else seen[:, None])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None = None, causal: bool = False) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=seen,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


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


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, has_sink: bool) -> Tensor:
    """Sliding window in blocks of w queries, each over its own block and the one before: 2w keys a query."""
    B, T, H, _ = q.shape
    G = k.shape[2]
    sinks = (k[:, :1], v[:, :1])
    if has_sink:
        k, v = k[:, 1:], v[:, 1:]
    n = -(-T // window)
    pad = n * window - T
    q = F.pad(q, (0, 0, 0, 0, 0, pad)).reshape(B * n, window, H, -1)
    both = []
    for x, first in ((k, sinks[0]), (v, sinks[1])):
        x = F.pad(x, (0, 0, 0, 0, window, pad)).view(B, n + 1, window, G, -1)
        x = torch.cat([x[:, :-1], x[:, 1:]], dim=2)  # [B, n, 2w, G, D]: the block before, then its own
        if has_sink:
            x = torch.cat([first[:, None].expand(B, n, 1, G, -1), x], dim=2)
        both.append(x.reshape(B * n, -1, G, x.shape[-1]))
    at = torch.arange(window, 2 * window, device=q.device)[:, None]
    key = torch.arange(2 * window, device=q.device)[None]
    seen = ((key <= at) & (key > at - window)).expand(n, window, 2 * window).clone()
    seen[0, :, :window] = False  # before the first token
    if has_sink:
        seen = F.pad(seen, (1, 0), value=True)
    seen = seen.repeat(B, 1, 1)[:, None]  # [B n, 1, w, 2w]
    out = _sdpa(q, both[0], both[1], scale, seen=seen)
    return out.reshape(B, n * window, H, -1)[:, :T]
