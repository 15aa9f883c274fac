"""Gradients, in the letters of `forward`. That of the inverse is -tril(dr y^T, -1), an outer product of what the walk
finds anyway:

    dy = P^T do + until (k dS')                      dr = Y^T dy = dv
    dS = total dS' + q^T (scale since do) - k^T (since dr)

`delta_rule_walk_back` carries dS from the last chunk to the first and makes dv; `delta_rule_gradients` makes all
others, of all chunks at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.delta_rule.kernels.chunks import at_end, covers, decays, documents, dot, running_decay
from archsearch_kernels.delta_rule.kernels.forward import walk_configs
from archsearch_kernels.launch import kernel


@kernel("delta_rule", configs=walk_configs)
@triton.jit(do_not_specialize=["T", "N", "H", "heads"])
def delta_rule_walk_back(
    q, k, do, inverse, reads, since, until, d_final, dv, d_initial, d_states,
    T, N, H, RATIO, heads, scale, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: dv, and the gradient of the state that every chunk leaves and of the initial.

    do and dv [B, T, H, V]; d_states [B, H, N, K, V] in the type of do; d_final (or None), d_initial [B, H, K, V].
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    value = (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    feature = tl.arange(0, KP)
    dtype = do.dtype.element_ty
    real, valued = covers(feature, K, KP)[None, :], covers(value, V, BV)[None, :]
    in_state = feature[:, None] * V + value[None, :]
    is_state = covers(feature, K, KP)[:, None] & valued
    q_at = q + (b * q_b + (h // RATIO) * q_h)
    k_at = k + (b * k_b + (h // RATIO) * k_h)
    out_at = (b * T * H + h) * V
    in_q, in_k = i[:, None] * q_t + feature[None, :], i[:, None] * k_t + feature[None, :]
    in_o = i[:, None] * (H * V) + value[None, :]
    square = i[:, None] * C + i[None, :]

    ds = tl.zeros((KP, BV), tl.float32)
    if d_final is not None:
        ds += tl.load(d_final + head * (K * V) + in_state, mask=is_state, other=0.0)
    for back in range(N):
        n = N - 1 - back
        chunk = head * N + n
        start = tl.cast(n, tl.int64) * C
        inside = (i < T - n * C)[:, None]
        k_ = tl.load(k_at + start * k_t + in_k, mask=inside & real, other=0.0)
        do_ = tl.load(do + out_at + start * (H * V) + in_o, mask=inside & valued, other=0.0)
        reads_ = tl.load(reads + chunk * (C * C) + square)
        inverse_ = tl.load(inverse + chunk * (C * C) + square)
        q_ = tl.load(q_at + start * q_t + in_q, mask=inside & real, other=0.0)
        first = tl.load(since + chunk * C + i)
        last = tl.load(until + chunk * C + i)
        total = tl.load(since + chunk * C + C - 1)

        left = ds.to(dtype)
        tl.store(d_states + chunk * (K * V) + in_state, left, mask=is_state)
        dy = dot(tl.trans(reads_), do_) + dot(k_, left) * last[:, None]
        dr = dot(tl.trans(inverse_), dy.to(dtype))  # [C, BV]
        tl.store(dv + out_at + start * (H * V) + in_o, dr.to(dtype), mask=inside & valued)
        ds = ds * total + dot(tl.trans(q_), (do_.to(tl.float32) * (first * scale)[:, None]).to(dtype))
        ds -= dot(tl.trans(k_), (dr * first[:, None]).to(dtype))
    tl.store(d_initial + head * (K * V) + in_state, ds, mask=is_state)


def gradient_configs(arguments):
    """BK features of k at a time, BV values: what a chunk's products over K and over V take of shared memory."""
    K, V = (max(16, triton.next_power_of_2(arguments[n])) for n in "KV")
    wide = [(64, 64, 8, 2), (64, 32, 8, 2), (64, 64, 8, 1), (64, 32, 4, 2)]
    if K <= 128:  # features in one go: more of a loop than that spills
        wide = [(128, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 1), *wide]
    found = dict.fromkeys((min(bk, K), min(bv, V), w, s) for bk, bv, w, s in wide)
    return [{"BK": bk, "BV": bv, "num_warps": w, "num_stages": s} for bk, bv, w, s in found]


@kernel("delta_rule", configs=gradient_configs)
@triton.jit(do_not_specialize=["T", "N", "H"])
def delta_rule_gradients(
    q, k, beta, g, seq_idx, do, y, dv, states, d_states, scratch, dq, dk, d_beta, dg,
    T, N, H, RATIO, scale, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq, dk [B, T, H, K] of every value head, d_beta and dg [B, T, H], from what the walks found; a program a chunk.

    scratch [B, H, N, 2, C, C] in the type of v. A decay's gradient: what a token reads (q, and k in r) grows with its
    running decay, what it writes (k) shrinks.
    """
    chunk = tl.program_id(0).to(tl.int64)
    start, head = (chunk % N) * C, chunk // N
    b, h = head // H, head % H
    length = (T - start).to(tl.int32)
    i = tl.arange(0, C)
    valid = i < length
    dtype = do.dtype.element_ty
    at_token = (b * T + start) * H + h
    log = running_decay(g if g is None else g + h, b * T + start, length, H, C)
    seen = i[:, None] >= i[None, :]
    if seq_idx is not None:
        doc, before, end = documents(seq_idx, b, start, T, C)
        seen = seen & (doc[:, None] == doc[None, :])

    value = tl.arange(0, BV)
    row = i[:, None] * (H * V)
    do_at, y_at, dv_at = do + at_token * V, y + at_token * V, dv + at_token * V
    moves = tl.zeros((C, C), tl.float32)  # do_i y_j
    erases = tl.zeros((C, C), tl.float32)  # dv_i y_j
    for v0 in range(0, V, BV):
        inside = valid[:, None] & covers(v0 + value, V, BV)[None, :]
        in_rows = row + (v0 + value)[None, :]
        do_ = tl.load(do_at + in_rows, mask=inside, other=0.0)  # [C, BV]
        y_ = tl.load(y_at + in_rows, mask=inside, other=0.0)
        dv_ = tl.load(dv_at + in_rows, mask=inside, other=0.0)
        moves += dot(do_, tl.trans(y_))
        erases += dot(dv_, tl.trans(y_))
    # Both are needed as they are and transposed, as operands: they go through memory.
    square = i[:, None] * C + i[None, :]
    moves_at = scratch + chunk * (2 * C * C)
    erases_at = moves_at + C * C
    decay = decays(log, seen, C, g is not None)
    tl.store(moves_at + square, (moves * (decay * scale)).to(dtype))
    tl.store(erases_at + square, tl.where(i[:, None] > i[None, :], -erases * decay, 0.0).to(dtype))
    tl.debug_barrier()
    moves_ = tl.load(moves_at + square)
    erases_ = tl.load(erases_at + square)

    step = tl.load(beta + at_token + i * H, mask=valid, other=0.0).to(tl.float32)
    total = at_end(log, C)
    first, last, total = tl.exp2(log), tl.exp2(tl.minimum(total - log, 0.0)), tl.exp2(total)
    if seq_idx is not None:
        first, last = tl.where(doc == before, first, 0.0), tl.where(doc == end, last, 0.0)
        total = tl.where(before == end, total, 0.0)
    d_step = tl.zeros((C,), tl.float32)
    d_log = tl.zeros((C,), tl.float32)
    at_last = tl.zeros((C,), tl.float32)  # what the running decay at the end gets, in parts
    carried = tl.zeros((BK,), tl.float32)
    q_at = q + (b * q_b + (h // RATIO) * q_h + start * q_t)
    k_at = k + (b * k_b + (h // RATIO) * k_h + start * k_t)
    s_at, ds_at = states + chunk * (K * V), d_states + chunk * (K * V)
    dq_at, dk_at = dq + at_token * K, dk + at_token * K
    for k0 in range(0, K, BK):
        feature = k0 + tl.arange(0, BK)
        real = covers(feature, K, BK)
        loaded = valid[:, None] & real[None, :]
        out = (i * (H * K))[:, None] + feature[None, :]
        reads = tl.zeros((C, BK), tl.float32)
        erased = tl.zeros((C, BK), tl.float32)
        for v0 in range(0, V, BV):
            valued = covers(v0 + value, V, BV)[None, :]
            in_rows, in_state = row + (v0 + value)[None, :], feature[:, None] * V + (v0 + value)[None, :]
            s = tl.load(s_at + in_state, mask=real[:, None] & valued, other=0.0)  # [BK, BV]
            do_ = tl.load(do_at + in_rows, mask=valid[:, None] & valued, other=0.0)
            dv_ = tl.load(dv_at + in_rows, mask=valid[:, None] & valued, other=0.0)
            reads += dot(do_, tl.trans(s))
            erased += dot(dv_, tl.trans(s))
        k_ = tl.load(k_at + (i[:, None] * k_t + feature[None, :]), mask=loaded, other=0.0)  # [C, BK]
        q_ = tl.load(q_at + (i[:, None] * q_t + feature[None, :]), mask=loaded, other=0.0)
        written = (k_.to(tl.float32) * step[:, None]).to(dtype)
        reads = reads * (first * scale)[:, None] + dot(moves_, written)
        tl.store(dq_at + out, reads.to(dtype), mask=loaded)
        erased = erased * -first[:, None] + dot(erases_, written)
        if g is not None:
            d_log += tl.sum(q_.to(tl.float32) * reads + k_.to(tl.float32) * erased, axis=1)

        wrote = tl.zeros((C, BK), tl.float32)
        # One stage: Triton 3.6 overwrites a prefetched operand that a product in flight still reads if it has a second
        # use, as ds has here (docs/design/0004-kernels.md).
        for v0 in tl.range(0, V, BV, num_stages=1):
            valued = covers(v0 + value, V, BV)[None, :]
            in_rows, in_state = row + (v0 + value)[None, :], feature[:, None] * V + (v0 + value)[None, :]
            ds = tl.load(ds_at + in_state, mask=real[:, None] & valued, other=0.0)
            y_ = tl.load(y_at + in_rows, mask=valid[:, None] & valued, other=0.0)
            wrote += dot(y_, tl.trans(ds))
            if g is not None:
                s = tl.load(s_at + in_state, mask=real[:, None] & valued, other=0.0)
                carried += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=1)
        wrote *= last[:, None]
        if g is not None:
            at_last += tl.sum(written.to(tl.float32) * wrote, axis=1)
        wrote += dot(tl.trans(moves_), q_)
        wrote += dot(tl.trans(erases_), k_)
        if g is not None:
            d_log -= tl.sum(written.to(tl.float32) * wrote, axis=1)
        d_step += tl.sum(k_.to(tl.float32) * wrote, axis=1)
        tl.store(dk_at + out, (erased + wrote * step[:, None]).to(dtype), mask=loaded)
    tl.store(d_beta + at_token + i * H, d_step.to(d_beta.dtype.element_ty), mask=valid)
    if g is not None:
        d_end = tl.sum(at_last, axis=0) + total * tl.sum(carried, axis=0)
        d_log += tl.where(i == C - 1, d_end, 0.0)
        back = tl.sum(d_log, axis=0) - tl.cumsum(d_log, axis=0) + d_log  # of all later tokens
        tl.store(dg + at_token + i * H, back.to(dg.dtype.element_ty), mask=valid)
