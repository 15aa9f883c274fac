"""Forward. A chunk of C tokens that finds the state S; running log decay G_i, D_ij = e^{G_i - G_j}, 0 across documents:

    r = v - since (k S)          since_i = e^{G_i}, 0 where token i's document began in this chunk
    y = Y r                      Y = (I + tril(k k^T D, -1) Diag(beta))^-1: what token j writes is beta_j k_j y_j^T
    o = scale since (q S) + P y  P = scale tril(q k^T D) Diag(beta)
    S' = total S + k^T (until y) until_j = beta_j e^{G_C - G_j}, 0 where j's document ends here; total = since_C

`delta_rule_pairs` makes Y, P, since and until of all chunks at once, `delta_rule_walk` carries S. Nothing is divided by
beta.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.delta_rule.kernels.chunks import at_end, covers, decays, documents, dot, running_decay
from archsearch_kernels.delta_rule.kernels.inverse import unit_lower_inverse
from archsearch_kernels.launch import grid, kernel


# One program a chunk and head; the substitution is a chain of small steps, so several programs share a multiprocessor.
@kernel("delta_rule", configs=grid(num_warps=(4, 8), num_stages=(1,)))
@triton.jit(do_not_specialize=["T", "N", "H"])
def delta_rule_pairs(
    q, k, beta, g, seq_idx, inverse, reads, since, until,
    T, N, H, RATIO, scale, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Y and P [B, H, N, C, C], since and until [B, H, N, C] of every chunk."""
    chunk = tl.program_id(0).to(tl.int64)  # over [B, H, N]
    start, head = (chunk % N) * C, chunk // N
    b, h = head // H, head % H
    length = (T - start).to(tl.int32)
    i = tl.arange(0, C)
    feature = tl.arange(0, KP)
    inside = (i < length)[:, None] & covers(feature, K, KP)[None, :]
    q_at = q + (b * q_b + (h // RATIO) * q_h + start * q_t)
    k_at = k + (b * k_b + (h // RATIO) * k_h + start * k_t)
    q_ = tl.load(q_at + (i[:, None] * q_t + feature[None, :]), mask=inside, other=0.0)  # [C, K]
    k_ = tl.load(k_at + (i[:, None] * k_t + feature[None, :]), mask=inside, other=0.0)
    step = tl.load(beta + ((b * T + start) * H + h) + i * H, mask=i < length, other=0.0).to(tl.float32)
    log = running_decay(g if g is None else g + h, b * T + start, length, H, C)

    seen = i[:, None] >= i[None, :]
    first, last = tl.exp2(log), tl.exp2(tl.minimum(at_end(log, C) - log, 0.0)) * step
    if seq_idx is not None:
        doc, before, end = documents(seq_idx, b, start, T, C)
        seen = seen & (doc[:, None] == doc[None, :])
        first, last = tl.where(doc == before, first, 0.0), tl.where(doc == end, last, 0.0)
    decay = decays(log, seen, C, g is not None) * step[None, :]

    tl.store(since + chunk * C + i, first)
    tl.store(until + chunk * C + i, last)
    square = i[:, None] * C + i[None, :]
    read = dot(q_, tl.trans(k_)) * (decay * scale)
    tl.store(reads + chunk * (C * C) + square, read.to(reads.dtype.element_ty))
    y = unit_lower_inverse(dot(k_, tl.trans(k_)) * decay, C)
    tl.store(inverse + chunk * (C * C) + square, y.to(inverse.dtype.element_ty))


def walk_configs(arguments):
    """Enough programs for the machine first: the walk is a chain, and one multiprocessor walks few heads fast.

    Loads of a step are issued when the step before the previous one ends: three stages, or nothing overlaps.
    """
    V, heads, KP, C = (arguments[n] for n in ("V", "heads", "KP", "C"))
    size = arguments["k"].element_size()
    most = 8192 if size == 2 else 4096  # numbers of state a program
    found = []
    for w in (64, 32, 16):
        if w > max(16, triton.next_power_of_2(V)) or KP * w > most:
            continue
        loaded, passed = size * C * (2 * KP + 2 * C + w), size * (KP + 2 * C) * w  # bytes: a step, between products
        stages = [s for s in (3, 2, 4) if s * loaded + passed < 225_000] or [1]
        warps = (8,) if KP * w == 8192 else (4, 8) if w > 16 else (4,)
        found += [{"BV": w, "num_warps": n, "num_stages": s} for s in stages for n in warps]
    width = next((c["BV"] for c in found if heads * triton.cdiv(V, c["BV"]) >= 120), found[-1]["BV"])
    return sorted(found, key=lambda c: c["BV"] != width)


@kernel("delta_rule", configs=walk_configs)
@triton.jit(do_not_specialize=["T", "N", "H", "heads"])
def delta_rule_walk(
    q, k, v, inverse, reads, since, until, state, o, final, y, states,
    T, N, H, RATIO, heads, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """From chunk to chunk, one tile of values: the output o and the last state, or (o None) y and what chunks find.

    state [B, H, K, V] or None; o and y [B, T, H, V]; states [B, H, N, K, V] in the type of v; final [B, H, K, V].
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    head = (tl.program_id(0) // tiles).to(tl.int64)  # over [B, H]
    b, h = head // H, head % H
    value = (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    feature = tl.arange(0, KP)
    dtype = v.dtype.element_ty
    real, valued = covers(feature, K, KP)[None, :], covers(value, V, BV)[None, :]
    in_state = feature[:, None] * V + value[None, :]
    is_state = covers(feature, K, KP)[:, None] & valued
    k_at = k + (b * k_b + (h // RATIO) * k_h)
    v_at = v + (b * v_b + h * v_h)
    out_at = (b * T * H + h) * V
    in_k, in_v = i[:, None] * k_t + feature[None, :], i[:, None] * v_t + value[None, :]
    in_o = i[:, None] * (H * V) + value[None, :]
    square = i[:, None] * C + i[None, :]
    if o is not None:
        q_at = q + (b * q_b + (h // RATIO) * q_h)
        in_q = i[:, None] * q_t + feature[None, :]

    s = tl.zeros((KP, BV), tl.float32)
    if state is not None:
        s += tl.load(state + head * (K * V) + in_state, mask=is_state, other=0.0).to(tl.float32)
    for n in range(N):
        chunk = head * N + n
        start = tl.cast(n, tl.int64) * C
        inside = (i < T - n * C)[:, None]
        k_ = tl.load(k_at + start * k_t + in_k, mask=inside & real, other=0.0)  # [C, K]
        v_ = tl.load(v_at + start * v_t + in_v, mask=inside & valued, other=0.0)  # [C, BV]
        inverse_ = tl.load(inverse + chunk * (C * C) + square)  # [C, C]
        first = tl.load(since + chunk * C + i)
        last = tl.load(until + chunk * C + i)
        total = tl.load(since + chunk * C + C - 1)

        found = s.to(dtype)
        r = v_.to(tl.float32) - dot(k_, found) * first[:, None]
        rows = dot(inverse_, r.to(dtype))  # y [C, BV]
        written = rows.to(dtype)
        if o is not None:
            q_ = tl.load(q_at + start * q_t + in_q, mask=inside & real, other=0.0)
            reads_ = tl.load(reads + chunk * (C * C) + square)
            seen = dot(q_, found) * (first * scale)[:, None] + dot(reads_, written)
            tl.store(o + out_at + start * (H * V) + in_o, seen.to(dtype), mask=inside & valued)
        else:
            tl.store(y + out_at + start * (H * V) + in_o, written, mask=inside & valued)
            tl.store(states + chunk * (K * V) + in_state, found, mask=is_state)
        s = s * total + dot(tl.trans(k_), (rows * last[:, None]).to(dtype))
    if o is not None:
        tl.store(final + head * (K * V) + in_state, s, mask=is_state)
