"""The delta rule of DeltaNet (2406.06484) and, with a decay per head, of Gated DeltaNet (2412.06464).

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = scale S_t^T q_t

a_t = e^{g_t}, 1 in DeltaNet; |k_t| = 1; b_t in (0, 1), or in (0, 2) for negative eigenvalues. Inside a chunk that finds
the state S, token t writes the row x_t = b_t (v_t - (decayed state that t finds)^T k_t); all rows together are
X = U - W S, where U and W come from the inverse of one unit triangular matrix (the UT transform). This is done for all
chunks at once, and only S is carried from chunk to chunk. Log decays are added up, never subtracted: no exponent is
positive, nothing cancels, and -inf forgets exactly, which is how packed documents are kept apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archsearch_kernels.rms_norm.reference import l2_norm


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, G, K], v [B, H, V], beta and g [B, H] (g None: no decay), state [B, H, K, V].

    Returns o [B, H, V] in v's dtype and the new state: `state` itself, written over, if `inplace`.
    """
    found = state
    work, groups = state.dtype, v.shape[1] // k.shape[1]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(v.device.type, enabled=False):
        key = k.to(work).repeat_interleave(groups, dim=1)[:, :, None]  # [B, H, 1, K]
        query = q.to(work).repeat_interleave(groups, dim=1)[:, :, None] * scale
        if g is not None:
            state = state * g.to(work).exp()[..., None, None]
        write = beta.to(work)[..., None, None] * (v.to(work)[:, :, None] - key @ state)  # [B, H, 1, V]
        state = state + key.mT @ write
        o = (query @ state).squeeze(2)
    return o.to(v.dtype), found.copy_(state) if inplace else state


def projected_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    *,
    max_beta: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token as projected: q, k [B, G, K], v [B, H, V], beta [B, H], state [B, H, K, V]; decay [B, H]."""
    q, k = l2_norm(q, dtype=state.dtype), l2_norm(k, dtype=state.dtype)
    beta = max_beta * beta.float().sigmoid()
    if decay is None or A_log is None or dt_bias is None:
        g = None
    else:
        g = -A_log.float().exp() * F.softplus(decay.float() + dt_bias.float())
    return delta_rule_step(q, k, v, beta, g, state, inplace=inplace)


def delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The truth: one token after another. Shapes as in `delta_rule`."""
    state = first_state(k, v, initial_state)
    rows = []
    for t in range(v.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(-1, 1, 1, 1)
        decay = None if g is None else g[:, t]
        o, state = delta_rule_step(q[:, t], k[:, t], v[:, t], beta[:, t], decay, state, scale=scale)
        rows.append(o)
    return torch.stack(rows, dim=1), state


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunkwise form for training and prefill, any T >= 1.

    q, k [B, T, G, K] with |k| = 1; v [B, T, H, V] with H a multiple of G (a key head serves H / G neighbouring value
    heads); beta [B, T, H]; g log decay <= 0 [B, T, H], None: no decay; scale None: K^-0.5; initial_state [B, H, K, V];
    `seq_idx` [B, T] numbers packed documents (the initial state belongs to the first); chunk a power of two, None:
    what suits the device. Returns o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32 (float64 for
    float64 v). Raises ValueError if chunk is not a power of two.
    """
    (B, T, H, _), K = v.shape, k.shape[-1]
    C = chunk_size(v, chunk)
    scale = K**-0.5 if scale is None else scale
    if g is None:
        g = torch.zeros_like(beta)
    if seq_idx is not None:
        g = forget_at_starts(g, seq_idx)
    with torch.autocast(v.device.type, enabled=False):
        state = first_state(k, v, initial_state)
        q, k, v_, beta, g = (to_chunks(x, C, H, state.dtype) for x in (q, k, v, beta, g))  # [N B H, C, ...]
        within = g[:, :, None].expand(-1, -1, C).tril(-1).cumsum(1).exp().tril()  # [N B H, C, C]: from token j to i
        since = g.cumsum(1).exp()  # [N B H, C]: from before the chunk to i
        until = within[:, -1]  # from token j to the chunk's end

        inverse = unit_lower_inverse(k @ k.mT * (within * beta[:, :, None])) * beta[:, None]
        u = inverse @ v_
        w = inverse @ (k * since[:, :, None])
        found, x, state = carry(u, w, k * until[:, :, None], since[:, -1:, None], state)
        o = torch.baddbmm((q * (since * scale)[:, :, None]) @ found, q @ k.mT * (within * scale), x)
        return from_chunks(o, B, T, H).to(v.dtype), state


def chunk_size(v: Tensor, chunk: int | None) -> int:
    """Tokens of a chunk of v [B, T, H, V], at most the smallest power of two that holds all T.

    By default 32 on the CPU, where less work counts, and 64 elsewhere, where fewer steps in a row do. Raises ValueError
    if `chunk` is not a power of two.
    """
    if chunk is None:
        return min(32 if v.device.type == "cpu" else 64, 1 << (v.shape[1] - 1).bit_length())
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk {chunk} is not a power of two")
    return min(chunk, 1 << (v.shape[1] - 1).bit_length())


def first_state(k: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    """The initial state, zeros by default, [B, H, K, V] in at least float32."""
    work = torch.promote_types(v.dtype, torch.float32)
    if initial_state is not None:
        return initial_state.to(work)
    return v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=work)


def forget_at_starts(g: Tensor, seq_idx: Tensor) -> Tensor:
    """Log decays [B, T, ...] with -inf at the first token of every document but the first."""
    starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return g.masked_fill(starts.view(*starts.shape, *[1] * (g.dim() - 2)), float("-inf"))


def to_chunks(x: Tensor, chunk: int, n_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, T, G, ...] to [N B H, C, ...], the chunks of a sequence outermost; zeros behind the last token."""
    if x.shape[2] != n_heads:
        x = x.repeat_interleave(n_heads // x.shape[2], dim=2)
    pad = -x.shape[1] % chunk
    if pad:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])  # [B, N, C, H, ...]
    return x.transpose(0, 1).transpose(2, 3).flatten(0, 2).to(dtype)


def from_chunks(x: Tensor, batch: int, n_tokens: int, n_heads: int) -> Tensor:
    """[N B H, C, V] back to [B, T, H, V]."""
    x = x.view(-1, batch, n_heads, *x.shape[1:])  # [N, B, H, C, V]
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :n_tokens]


def carry(u: Tensor, w: Tensor, k_until: Tensor, total: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From chunk to chunk: x = u - w S, then S = total S + k_until^T x.

    u [N B H, C, V], w and k_until [N B H, C, K], total [N B H, 1 or K, 1], state [B, H, K, V]. Returns the state that
    every chunk finds [N B H, K, V], x [N B H, C, V] and the last state [B, H, K, V].
    """
    last = state.flatten(0, 1)
    n = u.shape[0] // last.shape[0]
    found, rows = [], []
    for u_n, w_n, k_n, total_n in zip(*(t.chunk(n) for t in (u, w, k_until, total)), strict=True):
        found.append(last)
        rows.append(torch.baddbmm(u_n, w_n, last, alpha=-1))
        last = torch.baddbmm(total_n * last, k_n.mT, rows[-1])
    return torch.cat(found), torch.cat(rows), last.view_as(state)


class _UnitLowerInverse(torch.autograd.Function):
    """X = (I + A)^-1 for strictly lower triangles A of [M, C, C]; the gradient, -X^T dX X^T, needs nothing but X.

    The inverses P, Q of two neighbouring diagonal blocks give that of the block twice as large,
    [[I + A_1, 0], [R, I + A_2]]^-1 = [[P, 0], [-Q R P, Q]]: log2 C rounds of batched products. On one CPU core this and
    the products for U and W take half the time of `torch.linalg.solve_triangular` with their right sides.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        C = a.shape[-1]
        x = torch.eye(C, dtype=a.dtype, device=a.device).expand_as(a).contiguous()
        half = 1
        while half < C:
            new, old = diagonal_blocks(x, 2 * half), diagonal_blocks(a, 2 * half)
            new[..., half:, :half] = -(new[..., half:, half:] @ old[..., half:, :half] @ new[..., :half, :half])
            half *= 2
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -(x.mT @ grads[0] @ x.mT).tril(-1)


def unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + A)^-1 of the strictly lower triangles A of [M, C, C], C a power of two; the rest of [C, C] is not read."""
    x: Tensor = _UnitLowerInverse.apply(a)  # type: ignore[no-untyped-call]
    return x


def diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """A view of the blocks on the diagonal of [M, C, C]: [M, C / size, size, size]."""
    n = x.shape[-1] // size
    return x.view(-1, n, size, n, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
