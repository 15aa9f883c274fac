"""Kimi delta attention (2510.26692): the delta rule with one decay per key feature.

    S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T        o_t = scale S_t^T q_t        a_t = e^{g_t}

Chunks are put together as in the plain delta rule; what differs are the products of two tokens of a chunk, in which
every feature has a decay of its own. Factors e^{G_i} e^{-G_j} of the running sum G would overflow once G passes -88,
so a chunk is halved again and again instead: the decay from a token j of a left half to a token i of the right one is
(j to the end of the left) times (start of the right to i), both at most 1. Every pair is met in exactly one
halving, and decays are only ever multiplied: strong ones are exact, weak ones next to them too, and -inf forgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archsearch_kernels.delta_rule.reference import (
    carry,
    chunk_size,
    diagonal_blocks,
    first_state,
    forget_at_starts,
    from_chunks,
    to_chunks,
    unit_lower_inverse,
)
from archsearch_kernels.rms_norm.reference import l2_norm


def kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token: q, k, g [B, H, K], v [B, H, V], beta [B, H], state [B, H, K, V].

    Returns o [B, H, V] in v's dtype and the new state, which is `state` itself, written over, if `inplace`.
    """
    work, given = state.dtype, state
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(v.device.type, enabled=False):
        key = k.to(work)[:, :, None]  # [B, H, 1, K]
        state = state * g.to(work).exp()[..., None]
        write = beta.to(work)[..., None, None] * (v.to(work)[:, :, None] - key @ state)  # [B, H, 1, V]
        state = state + key.mT @ write
        o = ((q.to(work) * scale)[:, :, None] @ state).squeeze(2)
    return o.to(v.dtype), given.copy_(state) if inplace else state


def projected_kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token as projected: q, k, decay [B, H, K], v [B, H, V], beta [B, H], dt_bias [H K], state [B, H, K, V]."""
    dt = F.softplus(decay.float() + dt_bias.float().view(decay.shape[-2:]))
    q, k = l2_norm(q, dtype=state.dtype), l2_norm(k, dtype=state.dtype)
    beta, g = beta.float().sigmoid(), -A_log.float().exp()[:, None] * dt
    return kda_step(q, k, v, beta, g, state, inplace=inplace)


def kda_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The truth: one token after another. Shapes as in `kda`."""
    state = first_state(k, v, initial_state)
    rows = []
    for t in range(v.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(-1, 1, 1, 1)
        o, state = kda_step(q[:, t], k[:, t], v[:, t], beta[:, t], g[:, t], state, scale=scale)
        rows.append(o)
    return torch.stack(rows, dim=1), state


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunkwise form for training and prefill, any T >= 1.

    q, k [B, T, H, K] with |k| = 1; v [B, T, H, V]; beta [B, T, H]; g log decay <= 0 [B, T, H, K]; scale None: K^-0.5;
    initial_state [B, H, K, V]; `seq_idx` [B, T] numbers packed documents (the initial state belongs to the first);
    chunk a power of two, None: what suits the device. Returns o [B, T, H, V] in v's dtype and the final state
    [B, H, K, V] in float32 (float64 for float64 v). Raises ValueError if chunk is not a power of two.
    """
    (B, T, H, _), K = v.shape, k.shape[-1]
    C = chunk_size(v, chunk)
    if seq_idx is not None:
        g = forget_at_starts(g, seq_idx)
    with torch.autocast(v.device.type, enabled=False):
        state = first_state(k, v, initial_state)
        q, k, v_, beta, g = (to_chunks(x, C, H, state.dtype) for x in (q, k, v, beta, g))  # [N B H, C, ...]
        q = q * (K**-0.5 if scale is None else scale)
        reads, overlaps, since, until = decayed_products(q, k, g)

        inverse = unit_lower_inverse(overlaps * beta[:, :, None]) * beta[:, None]
        u = inverse @ v_
        w = inverse @ (k * since)
        found, x, state = carry(u, w, k * until, since[:, -1, :, None], state)
        o = torch.baddbmm((q * since) @ found, reads, x)
        return from_chunks(o, B, T, H).to(v.dtype), state


class _DecayedProducts(torch.autograd.Function):
    """Products of two tokens of a chunk under the decay between them, one halving after another.

    The gradient is written out because autograd would keep the decayed q and k of every halving.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        reads = torch.diag_embed((q * k).sum(-1))  # [M, C, C]
        overlaps = torch.zeros_like(reads)
        since, until = g.exp(), torch.ones_like(g)
        for s, from_start, to_end in _halvings(since, until):
            keys = (_side(k, s, 0) * to_end).mT  # [M, blocks, K, s]
            _across(reads, s).copy_((_side(q, s, 1) * from_start) @ keys)
            _across(overlaps, s).copy_((_side(k, s, 1) * from_start) @ keys)
        ctx.save_for_backward(q, k, g)
        return reads, overlaps, since, until

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, g = ctx.saved_tensors
        d_reads, d_overlaps, d_since, d_until = grads
        dq, dk_right, dk_left = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(k)
        since, until = g.exp(), torch.ones_like(g)
        for s, from_start, to_end in _halvings(since, until):
            d_read, d_overlap = _across(d_reads, s), _across(d_overlaps, s)  # [M, blocks, s, s]
            keys = _side(k, s, 0) * to_end
            _side(dq, s, 1).addcmul_(d_read @ keys, from_start)
            _side(dk_right, s, 1).addcmul_(d_overlap @ keys, from_start)
            d_keys = d_read.mT @ (_side(q, s, 1) * from_start)
            d_keys += d_overlap.mT @ (_side(k, s, 1) * from_start)
            _side(dk_left, s, 0).addcmul_(d_keys, to_end)
        # The pair (i, j) decays by g_{j+1} + ... + g_i: its share of dg begins at token i and ends behind token j.
        d_sum = (d_since * since).addcmul_(q, dq).addcmul_(k, dk_right).addcmul_(k, dk_left, value=-1)
        dg = d_sum.flip(1).cumsum_(1).flip(1)
        dg[:, 1:] += (d_until * until)[:, :-1].cumsum(1)
        d_own = d_reads.diagonal(dim1=1, dim2=2)[..., None]  # a token reads itself undecayed
        return dq.addcmul_(d_own, k), dk_right.add_(dk_left).addcmul_(d_own, q), dg


def decayed_products(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of the tokens of a chunk under the decay between them, from q, k, g [M, C, K], C a power of two.

    Returns q_i . decay(j to i) k_j for j <= i and k_i . decay(j to i) k_j for j < i, both [M, C, C] and 0 elsewhere,
    and the decays from before the chunk to token i and from token j to the chunk's end, both [M, C, K].
    """
    products: tuple[Tensor, Tensor, Tensor, Tensor] = _DecayedProducts.apply(q, k, g)  # type: ignore[no-untyped-call]
    return products


def _halvings(since: Tensor, until: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Blocks of 2s tokens for s = 1, 2, 4, ... C / 2, as s and two decays [M, blocks, s, K].

    They lead from a block's middle to the tokens of its right half, and from those of its left half to the middle.
    `since` and `until` [M, C, K] hold the decays inside blocks of one token at first (e^g and 1) and those inside the
    whole chunk at last: joining two blocks multiplies one half by the other's total.
    """
    s = 1
    while s < since.shape[1]:
        from_start, to_end = _side(since, s, 1), _side(until, s, 0)
        yield s, from_start, to_end
        to_end *= from_start[:, :, -1:]
        from_start *= _side(since, s, 0)[:, :, -1:]
        s *= 2


def _side(x: Tensor, s: int, side: int) -> Tensor:
    """A view of the left (0) or right (1) halves of the blocks of 2s tokens of [M, C, K]: [M, blocks, s, K]."""
    return x.view(x.shape[0], -1, 2, s, x.shape[2])[:, :, side]


def _across(x: Tensor, s: int) -> Tensor:
    """A view of [M, C, C] where the right half of a block of 2s tokens meets its left half: [M, blocks, s, s]."""
    return diagonal_blocks(x, 2 * s)[..., s:, :s]
