"""Linear attention with one decay per head, S_t = e^{g_t} S_{t-1} + k_t v_t^T and o_t = S_t^T q_t (2405.21060).

The decay is fixed in RetNet (2307.08621) and Lightning (2401.04658), computed from the input in simple GLA
(2312.06635) and Mamba-2. The chunkwise form works on all chunks at once and is sequential only from one chunk's state
to the next. Log decays are added up, never subtracted: no exponent is positive, nothing cancels, and a decay of
-inf forgets exactly, which is how packed documents are kept apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scalar_decay_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, G, K], v [B, H, V], g [B, H] or [H], state [B, H, K, V].

    Returns o [B, H, V] in v's dtype and the new state, which is `state` itself, written over, if `inplace`.
    """
    (B, G, K), (H, V) = q.shape, v.shape[1:]
    given = state
    work = state.dtype
    with torch.autocast(v.device.type, enabled=False):
        k, v_ = k.to(work).view(B, G, 1, K, 1), v.to(work).view(B, G, H // G, 1, V)
        decay = g.to(work).exp().expand(B, H).reshape(B, G, H // G, 1, 1)
        state = torch.addcmul(k * v_, decay, state.view(B, G, H // G, K, V))
        q = q.to(work).view(B, G, 1, 1, K) * (K**-0.5 if scale is None else scale)
        o = (q @ state).view(B, H, V)
    state = state.view(B, H, K, V)
    return o.to(v.dtype), given.copy_(state) if inplace else state


def ssd_operands(u: Tensor, dt: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Values dt u [..., H, P] and log decays -e^A_log dt [..., H] of Mamba-2, dt = softplus(dt + dt_bias) in fp32."""
    dt = F.softplus(dt.float() + dt_bias.float())
    return u * dt.to(u.dtype)[..., None], -A_log.float().exp() * dt


def ssd_step(
    C: Tensor,
    B: Tensor,
    u: Tensor,
    dt: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    state: Tensor,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of Mamba-2: `scalar_decay_step` of q = C, k = B, v = dt u with scale 1, and the skip D u.

    C, B [batch, G, N]; u [batch, H, P]; dt [batch, H] as projected (`ssd_operands`); A_log, dt_bias, D [H]; state
    [batch, H, N, P]. Returns y [batch, H, P] and the new state: `state` itself, written over, if `inplace`.
    """
    v, g = ssd_operands(u, dt, A_log, dt_bias)
    y, state = scalar_decay_step(C, B, v, g, state, scale=1.0, inplace=inplace)
    return torch.addcmul(y, D.to(u.dtype)[:, None], u), state


def scalar_decay_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The truth: one token after another. Shapes as in `scalar_decay`."""
    state = _first_state(q, v, initial_state)
    rows = []
    for t in range(v.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(-1, 1, 1, 1)
        now = g if g.dim() == 1 else g[:, t]
        o, state = scalar_decay_step(q[:, t], k[:, t], v[:, t], now, state, scale=scale)
        rows.append(o)
    return torch.stack(rows, dim=1), state


def scalar_decay(
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

    q, k [B, T, G, K] with H a multiple of G (each group serves R = H / G heads and is not repeated in memory);
    v [B, T, H, V]; g log decay <= 0, [B, T, H] or fixed [H]; scale None: K^-0.5; initial_state [B, H, K, V];
    `seq_idx` [B, T] numbers packed documents (the initial state belongs to the first); chunk a power of two.
    Returns o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32 (float64 for float64 v).
    Raises ValueError if chunk is not a power of two.
    """
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    R = H // G
    work = torch.promote_types(v.dtype, torch.float32)
    C = _chunk_length(T, chunk)
    n = -(-T // C)
    if g.dim() == 1:  # the same in every chunk, unless the last one is not full or documents end somewhere
        g = g.expand(1, C if n * C == T and seq_idx is None else T, H)
    g = g.to(work)
    if seq_idx is not None:
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))  # [B, T]
        g = g.masked_fill(starts[..., None], float("-inf"))
    state = _first_state(q, v, initial_state).view(B, G, R, K, V).transpose(2, 3)  # [B, G, K, R, V]

    with torch.autocast(v.device.type, enabled=False):
        q_ = _chunked(q.to(work) * (K**-0.5 if scale is None else scale), C).transpose(2, 3)  # [B, n, G, C, K]
        k_ = _chunked(k.to(work), C).transpose(2, 3)
        v_ = _chunked(v.to(work), C).view(B, n, C, G, R, V).permute(0, 1, 3, 4, 2, 5).contiguous()
        g = torch.unflatten(_chunked(g, C), 3, (G, R)).permute(0, 1, 3, 4, 2)  # [1 or B, 1 or n, G, R, C]
        within, since, until = _decays(g)

        scores = (q_ @ k_.mT)[:, :, :, None] * within  # [B, n, G, R, C, C]
        o = (scores @ v_).permute(0, 1, 4, 2, 3, 5)  # [B, n, C, G, R, V]
        write = (v_ * until[..., None]).transpose(3, 4).flatten(4)  # [B, n, G, C, R V]
        update = (k_.mT @ write).view(B, n, G, K, R, V)
        total = since[..., -1].expand(B, n, G, R)[..., None, :, None]  # [B, n, G, 1, R, 1]
        states = []  # as each chunk finds it
        for new, decay in zip(update.unbind(1), total.unbind(1), strict=True):
            states.append(state)
            state = torch.addcmul(new, decay, state)
        read = (q_ @ torch.stack(states, dim=1).flatten(4)).view(B, n, G, C, R, V)
        o = torch.addcmul(o, read.transpose(2, 3), since.permute(0, 1, 4, 2, 3)[..., None])
    return o.reshape(B, n * C, H, V)[:, :T].to(v.dtype), state.transpose(2, 3).reshape(B, H, K, V)


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
    """[B, T, ...] to [B, n, C, ...], zeros behind the last token."""
    pad = -x.shape[1] % C
    if pad:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
    return torch.unflatten(x, 1, (-1, C))


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decay between tokens of a chunk from log decays [..., C], C a power of two.

    Returns [..., C, C] from token j to i (0 where j > i), [..., C] from before the chunk to i, [..., C] from j to the
    chunk's end. Blocks are joined two by two, and from the left to the right one the decay is (from j to the end of
    the left) times (from the start of the right to i).
    """
    within = torch.ones_like(g)[..., None, None]  # [..., blocks, s, s], s = 1
    since = g[..., None]  # [..., blocks, s], log
    until = torch.zeros_like(since)
    while within.shape[-3] > 1:
        (a, b), (a_since, b_since), (a_until, b_until) = _pairs(within, -3), _pairs(since, -2), _pairs(until, -2)
        across = b_since.exp()[..., :, None] * a_until.exp()[..., None, :]
        within = torch.cat([F.pad(a, (0, a.shape[-1])), torch.cat([across, b], dim=-1)], dim=-2)
        until = torch.cat([a_until + b_since[..., -1:], b_until], dim=-1)
        since = torch.cat([a_since, b_since + a_since[..., -1:]], dim=-1)
    return within.squeeze(-3), since.squeeze(-2).exp(), until.squeeze(-2).exp()


def _pairs(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    a, b = torch.unflatten(x, dim, (-1, 2)).unbind(dim)
    return a, b
