"""Gradients of all chunks at once, from the states that they found and the gradients of those that they left.

`scalar_decay_query_gradients` makes dq, and for the gradient of the decays what each token reads of the state;
`scalar_decay_key_gradients` takes that and makes dk, dv and dg. PARTS programs share the heads of a group, which have
queries and keys in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from archsearch_kernels.launch import Arguments, Config, grid, kernel
from archsearch_kernels.scalar_decay.kernels.decays import _cumulated, _of, _total

DEFAULT_CACHE = tl.constexpr("")


def _gradients_configs(arguments: Arguments) -> Sequence[Config]:
    if arguments["R"] > arguments["PARTS"]:  # sums over heads are kept for all of K
        return _of(arguments, *grid(BK=(256,), num_warps=(4,), num_stages=(1, 2)))
    if arguments["k"].element_size() == 4:
        return _of(arguments, *grid(BK=(16,), num_warps=(8, 4), num_stages=(1,)))
    if max(arguments["KP"], arguments["VP"]) > 128:  # wider or more stages do not fit the shared memory
        return _of(arguments, *grid(BK=(64,), num_warps=(4,), num_stages=(2, 1)))
    if arguments["read"] is not None:  # with gradients of the decays the wide tiles need more registers than there are
        keys = "d_k" in arguments
        narrow = grid(BK=(64,), num_warps=(8,) if keys else (4, 8), num_stages=(1, 2))
        return _of(
            arguments,
            *narrow,
            *grid(BK=(32,), num_warps=(8,), num_stages=(2,)),
            *grid(BK=(128,), num_warps=(4, 8), num_stages=(1,)),
        )
    whole = min(arguments["KP"], 128)  # one step: nothing to fetch ahead
    return _of(
        arguments,
        {"BK": whole, "num_warps": 4, "num_stages": 1},
        *([] if whole <= 64 else grid(BK=(64,), num_warps=(4,), num_stages=(1, 2, 3))),
    )


@triton.jit
def _rows(
    x, stride, rows, inside, begin, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CACHE: tl.constexpr = DEFAULT_CACHE
):
    """Features `begin` to `begin + BLOCK` of a chunk's tokens [C, BLOCK]."""
    features = begin + tl.arange(0, BLOCK)
    mask = inside[:, None]
    if WIDTH % BLOCK:
        mask = mask & (features < WIDTH)[None, :]
    return tl.load(x + rows[:, None] * stride + features[None, :], mask=mask, other=0.0, cache_modifier=CACHE)


@triton.jit
def _keep(x, values, stride, rows, inside, begin, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store what `_rows` would load."""
    features = begin + tl.arange(0, BLOCK)
    mask = inside[:, None]
    if WIDTH % BLOCK:
        mask = mask & (features < WIDTH)[None, :]
    tl.store(x + rows[:, None] * stride + features[None, :], values.to(x.dtype.element_ty), mask=mask)


@kernel("scalar_decay", configs=_gradients_configs)
@triton.jit
def scalar_decay_query_gradients(
    q,
    k,
    v,
    g,
    seq,
    states,
    d_o,
    d_q,  # [PARTS, B, T, G, K]
    read,  # [B, T, H]; q . dq as far as it comes from the chunk's state
    B,
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
    o_b,
    o_t,
    o_h,
    R: tl.constexpr,  # heads a group
    PARTS: tl.constexpr,  # programs that share a group's heads
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    HEADS: tl.constexpr = R // PARTS
    WHOLE: tl.constexpr = BK == KP  # so it is where a program has several heads
    G = H // R
    chunks = (T + C - 1) // C
    pid = tl.program_id(0).to(tl.int64)
    part = pid % PARTS
    group = pid // PARTS % G
    chunk = pid // PARTS // G % chunks
    batch = pid // PARTS // G // chunks
    start = chunk * C
    rows = tl.arange(0, C)
    inside = rows < T - start
    q += batch * q_b + start * q_t + group * q_h
    k += batch * k_b + start * k_t + group * k_h
    d_q += (((part * B + batch) * T + start) * G + group) * K
    keep = rows[:, None] >= rows[None, :]
    if seq is not None:
        documents = seq + batch * T
        before = tl.load(documents + tl.maximum(start - 1, 0))
        own = tl.load(documents + start + rows, mask=inside, other=-1)
        keep = keep & (own[:, None] == own[None, :])

    if WHOLE:
        ks = _rows(k, k_t, rows, inside, 0, K, KP)
        if read is not None:
            qs = _rows(q, q_t, rows, inside, 0, K, KP)
    if HEADS > 1:
        dq = tl.zeros([C, KP], tl.float32)
    for r in range(HEADS):
        head = group * R + part * HEADS + r
        found_at = states + ((batch * chunks + chunk) * H + head) * (K * V)
        do = _rows(d_o + batch * o_b + start * o_t + head * o_h, o_t, rows, inside, 0, V, VP)
        vs = _rows(v + batch * v_b + start * v_t + head * v_h, v_t, rows, inside, 0, V, VP)
        decay = _cumulated(g, batch, head, start, T, H, FIXED, C)
        within = tl.where(keep, tl.exp2(tl.minimum(decay[:, None] - decay[None, :], 0.0)) * scale, 0.0)
        d_scores = (tl.dot(do, tl.trans(vs), input_precision=PRECISION) * within).to(do.dtype)
        since = tl.exp2(decay) * scale
        if seq is not None:
            since = tl.where(own == before, since, 0.0)
        reader = (do.to(tl.float32) * since[:, None]).to(do.dtype)
        if read is not None:
            out = tl.zeros([C, VP], tl.float32)
        for begin in range(0, K, BK):
            if not WHOLE:
                ks = _rows(k, k_t, rows, inside, begin, K, BK)
            of_k = begin + tl.arange(0, BK)
            found = _rows(found_at, V, of_k, of_k < K, 0, V, VP)  # [BK, VP]
            if read is not None:
                if not WHOLE:
                    qs = _rows(q, q_t, rows, inside, begin, K, BK)
                out = tl.dot(qs, found, out, input_precision=PRECISION)
            if HEADS == 1:
                dq = tl.zeros([C, BK], tl.float32)
            dq = tl.dot(reader, tl.trans(found), dq, input_precision=PRECISION)
            dq = tl.dot(d_scores, ks, dq, input_precision=PRECISION)
            if HEADS == 1:
                _keep(d_q, dq, G * K, rows, inside, begin, K, BK)
        if read is not None:
            product = tl.sum(out * do.to(tl.float32), axis=1) * since
            tl.store(read + (batch * T + start) * H + head + rows * H, product, mask=inside)
    if HEADS > 1:
        _keep(d_q, dq, G * K, rows, inside, 0, K, KP)


@kernel("scalar_decay", configs=_gradients_configs)
@triton.jit
def scalar_decay_key_gradients(
    q,
    k,
    v,
    g,
    seq,
    states,
    d_states,  # like states; the gradient of what each chunk leaves
    d_o,
    read,
    d_k,  # [PARTS, B, T, G, K]
    d_v,  # [B, T, H, V]
    d_g,  # [B, T, H]
    B,
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
    o_b,
    o_t,
    o_h,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    HEADS: tl.constexpr = R // PARTS
    WHOLE: tl.constexpr = BK == KP
    PIECE: tl.constexpr = min(KP, 64)
    G = H // R
    chunks = (T + C - 1) // C
    pid = tl.program_id(0).to(tl.int64)
    part = pid % PARTS
    group = pid // PARTS % G
    chunk = pid // PARTS // G % chunks
    batch = pid // PARTS // G // chunks
    start = chunk * C
    rows = tl.arange(0, C)
    inside = rows < T - start
    q += batch * q_b + start * q_t + group * q_h
    k += batch * k_b + start * k_t + group * k_h
    d_k += (((part * B + batch) * T + start) * G + group) * K
    # [keys, queries]: products are computed transposed where that is needed, no product is transposed afterwards.
    keep = rows[:, None] <= rows[None, :]
    if seq is not None:
        documents = seq + batch * T
        before = tl.load(documents + tl.maximum(start - 1, 0))
        end = tl.load(documents + tl.minimum(start + C, T) - 1)
        own = tl.load(documents + start + rows, mask=inside, other=-1)
        keep = keep & (own[:, None] == own[None, :])

    if WHOLE:
        qs = _rows(q, q_t, rows, inside, 0, K, KP)
        ks = _rows(k, k_t, rows, inside, 0, K, KP)
        scores = tl.dot(ks, tl.trans(qs), input_precision=PRECISION)
    else:
        scores = tl.zeros([C, C], tl.float32)
        for begin in range(0, K, BK):
            qs = _rows(q, q_t, rows, inside, begin, K, BK)
            ks = _rows(k, k_t, rows, inside, begin, K, BK)
            scores = tl.dot(ks, tl.trans(qs), scores, input_precision=PRECISION)
    if HEADS > 1:
        dk = tl.zeros([C, KP], tl.float32)
    for r in range(HEADS):
        head = group * R + part * HEADS + r
        here = ((batch * chunks + chunk) * H + head) * (K * V)
        if d_g is not None:  # in pieces, while no products are held
            carried = 0.0
            for piece in tl.static_range(0, K, PIECE):
                of_piece = piece + tl.arange(0, PIECE)
                left = _rows(d_states + here, V, of_piece, of_piece < K, 0, V, VP).to(tl.float32)
                left *= _rows(states + here, V, of_piece, of_piece < K, 0, V, VP).to(tl.float32)
                carried += tl.sum(tl.sum(left, axis=1), axis=0)
        do = _rows(d_o + batch * o_b + start * o_t + head * o_h, o_t, rows, inside, 0, V, VP)
        v_at = v + batch * v_b + start * v_t + head * v_h
        vs = _rows(v_at, v_t, rows, inside, 0, V, VP)
        decay = _cumulated(g, batch, head, start, T, H, FIXED, C)
        within = tl.where(keep, tl.exp2(tl.minimum(decay[None, :] - decay[:, None], 0.0)) * scale, 0.0)
        weights = (scores * within).to(do.dtype)
        d_scores = tl.dot(vs, tl.trans(do), input_precision=PRECISION) * within
        if d_g is not None:
            pairs = tl.where(rows[:, None] < rows[None, :], scores * d_scores, 0.0)
            rising = tl.sum(pairs, axis=0) - tl.sum(pairs, axis=1)
        d_scores = d_scores.to(do.dtype)
        total = _total(g, batch, head, start, T, H, FIXED, C)
        until = tl.exp2(tl.minimum(total - decay, 0.0))
        kept = tl.exp2(total)
        if seq is not None:
            until = tl.where(own == end, until, 0.0)
            kept = tl.where(before == end, kept, 0.0)
        # Read again, from the cache, what would otherwise stay in registers meanwhile.
        again = _rows(v_at, v_t, rows, inside, 0, V, VP, ".ca")
        writer = (again.to(tl.float32) * until[:, None]).to(vs.dtype)
        dv = tl.zeros([C, VP], tl.float32)
        for begin in range(0, K, BK):
            if not WHOLE:
                qs = _rows(q, q_t, rows, inside, begin, K, BK)
                ks = _rows(k, k_t, rows, inside, begin, K, BK)
            of_k = begin + tl.arange(0, BK)
            d_left = _rows(d_states + here, V, of_k, of_k < K, 0, V, VP)  # [BK, VP]
            if HEADS == 1:
                dk = tl.zeros([C, BK], tl.float32)
            dk = tl.dot(writer, tl.trans(d_left), dk, input_precision=PRECISION)
            dk = tl.dot(d_scores, qs, dk, input_precision=PRECISION)
            if HEADS == 1:
                _keep(d_k, dk, G * K, rows, inside, begin, K, BK)
            dv = tl.dot(ks, d_left, dv, input_precision=PRECISION)
        if d_g is not None:
            again = _rows(v_at, v_t, rows, inside, 0, V, VP, ".cg")
            written = tl.sum(dv * again.to(tl.float32), axis=1) * until
        dv = tl.dot(weights, do, dv * until[:, None], input_precision=PRECISION)
        _keep(d_v + ((batch * T + start) * H + head) * V, dv, H * V, rows, inside, 0, V, VP)
        if d_g is not None:
            # The decay into token t takes part in every pair and every read at or after t of something before it.
            at = (batch * T + start) * H + head + rows * H
            rising += tl.load(read + at, mask=inside, other=0.0)
            dg = tl.cumsum(rising, axis=0, reverse=True) + tl.cumsum(written, axis=0) - written + carried * kept
            tl.store(d_g + at, dg, mask=inside)
    if HEADS > 1:
        _keep(d_k, dk, G * K, rows, inside, 0, K, KP)
