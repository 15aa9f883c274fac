"""The state that each chunk finds, and the outputs.

`scalar_decay_states` walks the chunks and keeps the state that each one finds; walked backwards, with queries and
output gradients in place of keys and values, it keeps the state gradient that each one receives.
`scalar_decay_outputs` then works on all chunks at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from archsearch_kernels.launch import Arguments, Config, grid, kernel
from archsearch_kernels.scalar_decay.kernels.decays import _cumulated, _of, _total


def _states_configs(arguments: Arguments) -> Sequence[Config]:
    if arguments["k"].element_size() == 4:
        return _of(arguments, *grid(BK=(64,), BV=(32,), num_warps=(4,), num_stages=(2, 3)))
    return _of(
        arguments,
        {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 3},
        *grid(BK=(64, 128), BV=(32, 64), num_warps=(4,), num_stages=(2, 3, 4)),
        *grid(BK=(128,), BV=(64, 128), num_warps=(8,), num_stages=(2, 3)),
    )


@kernel("scalar_decay", configs=_states_configs)
@triton.jit
def scalar_decay_states(
    k,  # [B, T, G, K]; queries if REVERSE
    v,  # [B, T, H, V]; output gradients if REVERSE
    g,
    seq,
    first,  # [B, H, K, V]; what the walk begins with
    states,  # [B, chunks, H, K, V]; what each chunk finds
    last,  # [B, H, K, V]; what the walk ends with
    T,
    H,
    scale,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    FIXED: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    tiles: tl.constexpr = tiles_v * ((K + BK - 1) // BK)
    pid = tl.program_id(0)
    sequence = (pid // tiles).to(tl.int64)
    batch = sequence // H
    head = sequence % H
    rows = tl.arange(0, C)
    of_k = pid % tiles // tiles_v * BK + tl.arange(0, BK)
    of_v = pid % tiles % tiles_v * BV + tl.arange(0, BV)
    in_k = of_k < K
    in_v = of_v < V
    tile = of_k[:, None] * V + of_v[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    k += batch * k_b + head // R * k_h + of_k[:, None]
    v += batch * v_b + head * v_h + of_v[None, :]
    chunks = (T + C - 1) // C

    state = tl.zeros([BK, BV], tl.float32)
    if first is not None:
        state += tl.load(first + sequence * (K * V) + tile, mask=in_tile, other=0.0).to(tl.float32)
    for step in range(chunks):
        chunk = step
        if REVERSE:
            chunk = chunks - 1 - step
        start = tl.cast(chunk, tl.int64) * C
        here = ((batch * chunks + chunk) * H + head) * (K * V)
        tl.store(states + here + tile, state.to(states.dtype.element_ty), mask=in_tile)
        inside = rows < T - start
        kt = tl.load(k + start * k_t + rows[None, :] * k_t, mask=in_k[:, None] & inside[None, :], other=0.0)  # [BK, C]
        vs = tl.load(v + start * v_t + rows[:, None] * v_t, mask=inside[:, None] & in_v[None, :], other=0.0)  # [C, BV]
        decay = _cumulated(g, batch, head, start, T, H, FIXED, C)
        total = _total(g, batch, head, start, T, H, FIXED, C)
        if REVERSE:
            weight = tl.exp2(decay) * scale  # from before the chunk to the token
        else:
            weight = tl.exp2(tl.minimum(total - decay, 0.0))  # from the token to the chunk's end
        kept = tl.exp2(total)
        if seq is not None:
            documents = seq + batch * T
            before = tl.load(documents + tl.maximum(start - 1, 0))
            end = tl.load(documents + tl.minimum(start + C, T) - 1)
            own = tl.load(documents + start + rows, mask=inside, other=-1)
            weight = tl.where(own == (before if REVERSE else end), weight, 0.0)
            kept = tl.where(before == end, kept, 0.0)
        weighted = (vs.to(tl.float32) * weight[:, None]).to(vs.dtype)
        state = tl.dot(kt, weighted, state * kept, input_precision=PRECISION)
    if last is not None:
        tl.store(last + sequence * (K * V) + tile, state, mask=in_tile)


def _outputs_configs(arguments: Arguments) -> Sequence[Config]:
    if arguments["k"].element_size() == 4:
        return _of(arguments, *grid(BK=(32, 16), BV=(64, 32), num_warps=(4,), num_stages=(1, 2)))
    return _of(
        arguments,
        {"BK": 64, "BV": 128, "num_warps": 4, "num_stages": 2},
        *grid(BK=(64, 128), BV=(64, 128), num_warps=(4,), num_stages=(1, 2, 3)),
        *grid(BK=(64, 128), BV=(128,), num_warps=(8,), num_stages=(1, 2)),
    )


@kernel("scalar_decay", configs=_outputs_configs)
@triton.jit
def scalar_decay_outputs(
    q,
    k,
    v,
    g,
    seq,
    states,
    o,  # [B, T, H, V]
    T,
    H,
    scale,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    chunks = (T + C - 1) // C
    pid = tl.program_id(0)
    at = (pid // tiles_v).to(tl.int64)  # chunk of a head, heads innermost: those of a group read the same keys
    head = at % H
    batch = at // H // chunks
    start = at // H % chunks * C
    rows = tl.arange(0, C)
    inside = rows < T - start
    of_v = pid % tiles_v * BV + tl.arange(0, BV)
    in_v = of_v < V
    q += batch * q_b + start * q_t + head // R * q_h + rows[:, None] * q_t
    k += batch * k_b + start * k_t + head // R * k_h + rows[None, :] * k_t
    v += batch * v_b + start * v_t + head * v_h + rows[:, None] * v_t
    states += at * (K * V)

    scores = tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, BV], tl.float32)
    for begin in range(0, K, BK):
        of_k = begin + tl.arange(0, BK)
        in_k = of_k < K
        qs = tl.load(q + of_k[None, :], mask=inside[:, None] & in_k[None, :], other=0.0)  # [C, BK]
        kt = tl.load(k + of_k[:, None], mask=in_k[:, None] & inside[None, :], other=0.0)  # [BK, C]
        found = tl.load(
            states + of_k[:, None] * V + of_v[None, :], mask=in_k[:, None] & in_v[None, :], other=0.0
        )  # [BK, BV]
        scores = tl.dot(qs, kt, scores, input_precision=PRECISION)
        out = tl.dot(qs, found, out, input_precision=PRECISION)
    vs = tl.load(v + of_v[None, :], mask=inside[:, None] & in_v[None, :], other=0.0)  # [C, BV]
    decay = _cumulated(g, batch, head, start, T, H, FIXED, C)
    since = tl.exp2(decay)
    keep = rows[:, None] >= rows[None, :]
    if seq is not None:
        documents = seq + batch * T
        before = tl.load(documents + tl.maximum(start - 1, 0))
        own = tl.load(documents + start + rows, mask=inside, other=-1)
        since = tl.where(own == before, since, 0.0)
        keep = keep & (own[:, None] == own[None, :])
    within = tl.where(keep, tl.exp2(tl.minimum(decay[:, None] - decay[None, :], 0.0)) * scale, 0.0)
    out = tl.dot((scores * within).to(vs.dtype), vs, out * (since * scale)[:, None], input_precision=PRECISION)
    to = ((batch * T + start) * H + head) * V + rows[:, None] * (H * V) + of_v[None, :]
    tl.store(o + to, out.to(o.dtype.element_ty), mask=inside[:, None] & in_v[None, :])
