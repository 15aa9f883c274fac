"""Device code of the delta rule (2406.06484, 2412.06464): pairs of a chunk, the two walks over chunks, the gradients.

A chunk of C tokens that finds the state S; running log decay G_i, D_ij = e^{G_i - G_j}, 0 across documents:

    r = v - since (k S)          since_i = e^{G_i}, 0 where token i's document began in this chunk
    y = Y r                      Y = (I + tril(k k^T D, -1) Diag(beta))^-1: what token j writes is beta_j k_j y_j^T
    o = scale since (q S) + P y  P = scale tril(q k^T D) Diag(beta)
    S' = total S + k^T (until y) until_j = beta_j e^{G_C - G_j}, 0 where j's document ends here; total = since_C

`delta_rule_pairs` makes Y, P, since and until of all chunks at once, `delta_rule_walk` carries S. Nothing is divided by
beta, and the gradient of the inverse is -tril(dr y^T, -1), an outer product of what the backward walk finds anyway:

    dy = P^T do + until (k dS')                      dr = Y^T dy = dv
    dS = total dS' + q^T (scale since do) - k^T (since dr)

Operands of large products are loaded or pass through shared memory; none is another product's result transposed or left
in registers, which triton 3.4 to 3.7.0 and their ptxas get wrong on Hopper: what is needed both ways goes to memory and
back. (The small products of the inverse run on the older instructions.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.launch import grid, kernel

# Sizes are never compiled in: one chunk or one head runs the code that was checked with many (docs/log.md).
LOG2E = tl.constexpr(1.4426950408889634)
WEAKEST = tl.constexpr(-40.0)  # e^-40 = 4e-18: a log decay below is as good as it, and sums of 64 stay exact to 1e-4


@triton.jit
def dot(a, b):
    """a b in float32; float32 operands off the tensor cores.

    Three passes of tf32 would take operands from registers on Hopper, where ptxas up to 13.0 writes out of bounds.
    """
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def small_dot(a, b):
    """a b in float32, three passes of tf32: below 64 rows, on the older instructions, that is safe."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def quarters(a, HALF: tl.constexpr):
    """The four [HALF, HALF] blocks of a [2 HALF, 2 HALF] tile: upper left, upper right, lower left, lower right."""
    blocks = tl.permute(tl.reshape(a, (2, HALF, 2, HALF)), (1, 3, 0, 2))  # [row, column, lower, right]
    left, right = tl.split(blocks)
    upper_left, lower_left = tl.split(left)
    upper_right, lower_right = tl.split(right)
    return upper_left, upper_right, lower_left, lower_right


@triton.jit
def from_quarters(upper_left, upper_right, lower_left, lower_right, HALF: tl.constexpr):
    """The tile whose blocks these are."""
    blocks = tl.join(tl.join(upper_left, upper_right), tl.join(lower_left, lower_right))  # [row, column, right, lower]
    return tl.reshape(tl.permute(blocks, (3, 0, 2, 1)), (2 * HALF, 2 * HALF))


@triton.jit
def merged_inverse(p, r, q, HALF: tl.constexpr):
    """[[I + A_1, 0], [R, I + A_2]]^-1 = [[P, 0], [-Q R P, Q]] from P, R, Q [HALF, HALF]."""
    return from_quarters(p, tl.zeros((HALF, HALF), tl.float32), -small_dot(small_dot(q, r), p), q, HALF)


@triton.jit
def diagonal_inverses(a, C: tl.constexpr):
    """The inverses of the 16x16 blocks on the diagonal of I + a: [C / 16, 16, 16], a [C, C] float32.

    I + A is the product of (I + a_j e_j^T) over its columns a_j, so 15 rank-one updates of I undo one column each.
    """
    N: tl.constexpr = C // 16
    i = tl.arange(0, N)
    on = (i[:, None] == i[None, :])[:, None, :, None]
    a = tl.sum(tl.where(on, tl.reshape(a, (N, 16, N, 16)), 0.0), axis=2)  # [N, 16, 16]
    e = tl.arange(0, 16)
    row, column = e[None, :, None], e[None, None, :]
    a = tl.where(row > column, a, 0.0)
    x = tl.where(row == column, 1.0, 0.0) + tl.zeros_like(a)
    for j in range(15):
        step = tl.sum(tl.where(column == j, a, 0.0), axis=2)  # column j of A
        found = tl.sum(tl.where(row == j, x, 0.0), axis=1)  # row j so far
        x = x - step[:, :, None] * found[:, None, :]
    return x


@triton.jit
def unit_lower_inverse(a, C: tl.constexpr):
    """(I + A)^-1 [C, C] float32 of the strictly lower triangle A of `a` [C, C] float32; C is 16, 32 or 64.

    What stands on or above the diagonal of `a` is not used. 16x16 blocks are inverted by substitution in float32, then
    merged in pairs by products in tf32x3. Stable for |A_ij| <= 2 (betas up to 2 and the same key all along).
    """
    x = diagonal_inverses(a, C)
    if C == 16:
        out = tl.reshape(x, (16, 16))
    elif C == 32:
        out = _inverse_32(a, x)
    else:
        tl.static_assert(C == 64, "unit_lower_inverse takes 16, 32 or 64 rows")
        out = _inverse_64(a, x)
    return out


@triton.jit
def _inverse_32(a, x):
    """From a [32, 32] and the inverses of its diagonal blocks x [2, 16, 16]."""
    p, q = tl.split(tl.permute(x, (1, 2, 0)))
    _, _, r, _ = quarters(a, 16)
    return merged_inverse(p, r, q, 16)


@triton.jit
def _inverse_64(a, x):
    """From a [64, 64] and the inverses of its diagonal blocks x [4, 16, 16]."""
    upper, lower = tl.split(tl.permute(tl.reshape(x, (2, 2, 16, 16)), (1, 2, 3, 0)))
    a_1, _, r, a_2 = quarters(a, 32)
    return merged_inverse(_inverse_32(a_1, upper), r, _inverse_32(a_2, lower), 32)


@triton.jit
def running_decay(g, first_token, length, H, C: tl.constexpr):
    """The sum of the log decays of a chunk from its start up to every token, in units of log 2: [C].

    g [B, T, H] at the head; first_token: b T + t of the chunk's start; length: its tokens.
    """
    i = tl.arange(0, C)
    if g is None:
        total = tl.zeros((C,), tl.float32)
    else:
        x = tl.load(g + first_token * H + i * H, mask=i < length, other=0.0).to(tl.float32)
        total = tl.cumsum(tl.maximum(x, WEAKEST) * LOG2E, axis=0)
    return total


@triton.jit
def at_end(x, C: tl.constexpr):
    """The last of [C]."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0.0), axis=0)


@triton.jit
def documents(seq_idx, b, start, T, C: tl.constexpr):
    """Document numbers of a chunk's tokens [C], of the token before it and of its last. The initial state belongs to
    the first token's document, tokens behind the end to the last token's."""
    at = seq_idx + b * T
    doc = tl.load(at + tl.minimum(start + tl.arange(0, C), T - 1))
    before = tl.load(at + tl.maximum(start - 1, 0))
    last = tl.load(at + tl.minimum(start + C - 1, T - 1))
    return doc, before, last


@triton.jit
def covers(index, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Which of the indices are below SIZE: all, and the compiler shall know, where SIZE is whole tiles."""
    if SIZE % TILE == 0:
        out = tl.full(index.shape, 1, tl.int1)
    else:
        out = index < SIZE
    return out


@triton.jit
def decays(log, seen, C: tl.constexpr, GATED: tl.constexpr):
    """e^{log_i - log_j} where token i has `seen` j, else 0: [C, C]."""
    if GATED:
        out = tl.exp2(tl.where(seen, log[:, None] - log[None, :], float("-inf")))
    else:
        out = tl.where(seen, 1.0, 0.0)
    return out


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


def token_configs(arguments):
    """Narrow tiles where few heads would leave multiprocessors idle."""
    o, V = arguments["o"], arguments["V"]
    shapes = [(32, 4), (16, 4), (16, 2), (32, 2), (32, 8), (64, 4), (64, 8), (128, 8)]
    if o.numel() // V * triton.cdiv(V, 32) < 132:
        shapes[:2] = [(16, 4), (32, 4)]
    return [{"BV": w, "num_warps": n, "num_stages": 1} for w, n in shapes]


@kernel("delta_rule", configs=token_configs)
@triton.jit(do_not_specialize=["H"])
def delta_rule_token(
    q, k, v, beta, g, state, o, new, H, RATIO, scale,
    q_b, q_h, k_b, k_h, v_b, v_h, beta_b, g_b, state_b, state_h,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token: a program owns BV values of a head with all features; `new` may be `state`."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    value = (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    feature = tl.arange(0, KP)
    real, valued = covers(feature, K, KP), covers(value, V, BV)
    inside = real[:, None] & valued[None, :]
    in_state = b * state_b + h * state_h + feature[:, None] * V + value[None, :]
    s = tl.load(state + in_state, mask=inside, other=0.0).to(tl.float32)  # [K, BV]
    q_ = tl.load(q + b * q_b + (h // RATIO) * q_h + feature, mask=real, other=0.0).to(tl.float32)
    k_ = tl.load(k + b * k_b + (h // RATIO) * k_h + feature, mask=real, other=0.0).to(tl.float32)
    v_ = tl.load(v + b * v_b + h * v_h + value, mask=valued, other=0.0).to(tl.float32)
    step = tl.load(beta + b * beta_b + h).to(tl.float32)
    if g is not None:
        s *= tl.exp2(tl.load(g + b * g_b + h).to(tl.float32) * LOG2E)
    write = step * (v_ - tl.sum(k_[:, None] * s, axis=0))
    s += k_[:, None] * write[None, :]
    o_ = tl.sum(q_[:, None] * s, axis=0) * scale
    tl.store(new + in_state, s.to(new.dtype.element_ty), mask=inside)
    tl.store(o + (head * V) + value, o_.to(o.dtype.element_ty), mask=valued)
