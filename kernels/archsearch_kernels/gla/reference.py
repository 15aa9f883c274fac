"""Gated linear attention, S_t = Diag(e^{g_t}) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t (Yang et al., 2312.06635).

The usual factorisation of a chunk, (q e^G)(k e^-G)^T with G the running sum of g, overflows once G passes -88. Here a
chunk is halved again and again instead: from the left half to the right half of a block every decay is (from j to the
left's end) times (from the right's start to i), two numbers below one, and each pair of tokens is met in exactly one
block. Log decays are added up, never subtracted, so nothing cancels and a decay of -inf forgets exactly, which is how
packed documents are kept apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token: q, k, g [B, H, K], v [B, H, V], state [B, H, K, V].

    Returns o [B, H, V] in v's dtype and the new state, which is `state` itself, written over, if `inplace`.
    """
    work, given = state.dtype, state
    with torch.autocast(v.device.type, enabled=False):
        write = k.to(work)[..., None] * v.to(work)[..., None, :]
        state = torch.addcmul(write, g.to(work).exp()[..., None], state)
        q = q.to(work)[..., None, :] * (q.shape[-1] ** -0.5 if scale is None else scale)
        o = (q @ state).squeeze(-2)
    return o.to(v.dtype), given.copy_(state) if inplace else state


def gla_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The truth: one token after another. Shapes as in `gla`."""
    state = _first_state(q, v, initial_state)
    rows = []
    for t in range(v.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(-1, 1, 1, 1)
        o, state = gla_step(q[:, t], k[:, t], v[:, t], g[:, t], state, scale=scale)
        rows.append(o)
    return torch.stack(rows, dim=1), state


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunkwise form for training and prefill, any T >= 1.

    q, k [B, T, H, K]; v [B, T, H, V]; g log decay <= 0 [B, T, H, K]; scale None: K^-0.5; initial_state [B, H, K, V];
    `seq_idx` [B, T] numbers packed documents (the initial state belongs to the first); chunk a power of two.
    Returns o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32 (float64 for float64 v).
    Raises ValueError if chunk is not a power of two.
    """
    (B, T, H, K), V = q.shape, v.shape[3]
    work = torch.promote_types(v.dtype, torch.float32)
    C = _chunk_length(T, chunk)
    g = g.to(work)
    if seq_idx is not None:
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))  # [B, T]
        g = g.masked_fill(starts[..., None, None], float("-inf"))
    state = _first_state(q, v, initial_state)
    with torch.autocast(v.device.type, enabled=False):
        q = _chunked(q.to(work) * (K**-0.5 if scale is None else scale), C)  # [B, n, H, C, K]
        k, v_, g = _chunked(k.to(work), C), _chunked(v.to(work), C), _chunked(g, C)
        scores, since, until = _scores(q, k, g)

        update = (k * until.exp()).mT @ v_  # [B, n, H, K, V]
        total = since[..., -1, :, None].exp()  # [B, n, H, K, 1]
        states = []  # as each chunk finds it
        for new, decay in zip(update.unbind(1), total.unbind(1), strict=True):
            states.append(state)
            state = torch.addcmul(new, decay, state)
        o = scores @ v_ + (q * since.exp()) @ torch.stack(states, dim=1)  # [B, n, H, C, V]
    return o.transpose(2, 3).reshape(B, -1, H, V)[:, :T].to(v.dtype), state


def _first_state(q: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    work = torch.promote_types(v.dtype, torch.float32)
    if initial_state is not None:
        return initial_state.to(work)
    return v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=work)


def _chunk_length(T: int, chunk: int) -> int:
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk {chunk} is not a power of two")
    return min(chunk, 1 << (T - 1).bit_length())


def _chunked(x: Tensor, C: int) -> Tensor:
    """[B, T, H, D] to [B, n, H, C, D], zeros behind the last token."""
    pad = -x.shape[1] % C
    if pad:
        x = F.pad(x, (0, 0, 0, 0, 0, pad))
    return torch.unflatten(x, 1, (-1, C)).transpose(2, 3).contiguous()


def _scores(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_i . (decay from j to i) k_j for j <= i, all [..., C, K] with C a power of two.

    Returns scores [..., C, C], log decays [..., C, K] from before the chunk to i, and from j to the chunk's end.
    """
    scores = (q * k).sum(-1)[..., None, None]  # [..., blocks, s, s], s = 1
    since, until = g, torch.zeros_like(g)  # of each token's block, [..., C, K]
    s = 1
    while s < g.shape[-2]:
        (_, right_q), (left_k, _) = _halves(q, s), _halves(k, s)  # [..., blocks, s, K]
        left_since, right_since = _halves(since, s)
        left_until, right_until = _halves(until, s)
        across = (right_q * right_since.exp()) @ (left_k * left_until.exp()).mT
        left, right = torch.unflatten(scores, -3, (-1, 2)).unbind(-3)
        scores = torch.cat([F.pad(left, (0, s)), torch.cat([across, right], dim=-1)], dim=-2)
        until = torch.cat([left_until + right_since[..., -1:, :], right_until], dim=-2).flatten(-3, -2)
        since = torch.cat([left_since, right_since + left_since[..., -1:, :]], dim=-2).flatten(-3, -2)
        s *= 2
    return scores.squeeze(-3), since, until


def _halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    left, right = torch.unflatten(x, -2, (-1, 2, s)).unbind(-3)
    return left, right
