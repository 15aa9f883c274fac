"""Device code of gated linear attention (2312.06635): five kernels over chunks of 64 tokens, and the decode step.

The pairs of a chunk and their gradients are those of the delta rule with such decays (kda) too: there token j writes
beta_j k_j, and is itself read with k before it writes. What only that needs has arguments that may be None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.gla.decays import (
    LEVELS,
    LOG2E,
    SINCE,
    UNTIL,
    C,
    between,
    documents,
    factors,
    load_decays,
    load_rows,
    met_after,
    met_before,
    store_rows,
    strengths,
    sums,
    within,
)
from archsearch_kernels.launch import Arguments, Config, grid, kernel


def intra_configs(arguments: Arguments) -> list[Config]:
    """Narrow tiles: the scores take most of the registers."""
    if arguments["q"].element_size() == 4:
        return grid(BK=(32,), num_warps=(8, 4), num_stages=(1,))
    return grid(BK=(32,), num_warps=(4,), num_stages=(1, 2)) + grid(BK=(64,), num_warps=(8,), num_stages=(1,))


def score_configs(arguments: Arguments) -> list[Config]:
    if arguments["v"].element_size() == 4:
        return grid(BV=(32,), num_warps=(8, 4), num_stages=(1,))
    return grid(BV=(32 if arguments["V"] <= 32 else 64,), num_warps=(4,), num_stages=(1, 2))


def gradient_configs(arguments: Arguments) -> list[Config]:
    """All values at once where they fit: every step of a loop over them waits for its loads."""
    if arguments["q"].element_size() == 4:
        return grid(BV=(32,), num_warps=(8, 4), num_stages=(1,))
    V = arguments["V"]
    return grid(BV=(32,) if V <= 32 else (64,) if V <= 64 else (128, 64), num_warps=(4,), num_stages=(1,))


def state_configs(arguments: Arguments) -> list[Config]:
    if arguments["values"].element_size() == 4:
        return grid(BV=(16,), num_warps=(8, 4), num_stages=(1, 2))
    if arguments["V"] <= 16:
        return grid(BV=(16,), num_warps=(4, 8), num_stages=(3, 2))
    return grid(BV=(32, 16, 64), num_warps=(4, 8), num_stages=(3, 2))


def output_configs(arguments: Arguments) -> list[Config]:
    V, wide = arguments["V"], arguments["x"].element_size() == 4
    if V <= 32:
        return grid(BV=(16 if V <= 16 else 32,), BK=(64,), num_warps=(4,), num_stages=(1, 2))
    if wide:
        return grid(BV=(32,), BK=(64, 32), num_warps=(8,), num_stages=(1, 2))
    found = grid(BV=(64,), BK=(64,), num_warps=(4,), num_stages=(2, 3))
    return grid(BV=(128,), BK=(64,), num_warps=(4, 8), num_stages=(2, 3)) + found if V > 64 else found


@kernel("gla", configs=intra_configs)
@triton.jit
def gla_intra(
    q, k, g, beta, seq_idx, spans, scores, overlaps, q_since, k_since, k_until, total, scale, T, H,
    q_row, k_row, g_row, beta_row, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What a chunk needs of itself: scores [C, C] of its pairs, q and k decayed to its start and end, its own decay.

    Documents are told apart here: what another document's state would meet is written as 0. With `overlaps` also the
    float32 scores of k and earlier k, and k decayed to the start; with `beta` tokens write beta k: scores and k_until.
    """
    WIDE: tl.constexpr = q.dtype.element_ty == tl.float32
    HALF: tl.constexpr = q.dtype.element_ty == tl.float16
    n_chunks = tl.cdiv(T, C)
    chunk = tl.program_id(0) % n_chunks
    bh = (tl.program_id(0) // n_chunks).to(tl.int64)
    h = bh % H
    origin = (bh // H) * T
    start = chunk * C
    first = origin + start
    i, j = tl.arange(0, C), tl.arange(0, C)
    inside = start + i < T
    reads, writes, survives = inside, inside, 1.0
    if seq_idx is not None:
        doc, before, last = documents(seq_idx, origin, start, i, inside, T)
        reads, writes, survives = reads & (doc == before), writes & (doc == last), tl.where(before == last, 1.0, 0.0)
    found = tl.zeros([C, C], tl.float32)
    found_k = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    strength = strengths(beta, first, beta_row, h, i, inside)
    for block in range(0, K, BK):
        n = block + tl.arange(0, BK)
        q_tile = load_rows(q, first, q_row, h * K, i, n, inside, K)
        k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K)
        g_tile = load_decays(g, first, g_row, h * K, i, n, inside, K)
        own += tl.sum(q_tile.to(tl.float32) * k_tile.to(tl.float32), axis=1)
        level = LEVELS - 1
        while level >= 0:
            apart = between(spans, level, i, j, g_tile, WIDE)
            up, down, weak = factors(apart, i, level, HALF)
            met = within(j, met_before(i, level, weak))
            earlier = tl.trans((k_tile.to(tl.float32) * down).to(k_tile.dtype))
            later = (q_tile.to(tl.float32) * up).to(q_tile.dtype)
            found = tl.where(met, tl.dot(later, earlier, found, input_precision="ieee"), found)
            if overlaps is not None:
                later = (k_tile.to(tl.float32) * up).to(k_tile.dtype)
                found_k = tl.where(met, tl.dot(later, earlier, found_k, input_precision="ieee"), found_k)
            level = tl.where(weak, -1, level - 1)

    found = tl.where(i[:, None] > j[None, :], found, tl.where(i[:, None] == j[None, :], own[:, None], 0.0)) * scale
    found_k = tl.where(i[:, None] > j[None, :], found_k, 0.0)
    strength_j = strengths(beta, first, beta_row, h, j, start + j < T)
    found, found_k = found * strength_j[None, :], found_k * strength_j[None, :]
    if seq_idx is not None:
        doc_i = tl.load(seq_idx + first + i, mask=inside, other=-1)
        doc_j = tl.load(seq_idx + first + j, mask=start + j < T, other=-1)
        same = doc_i[:, None] == doc_j[None, :]
        found, found_k = tl.where(same, found, 0.0), tl.where(same, found_k, 0.0)
    at = (bh * n_chunks + chunk) * C * C + i[:, None] * C + j[None, :]
    tl.store(scores + at, found.to(scores.dtype.element_ty))
    if overlaps is not None:
        tl.store(overlaps + at, found_k)

    for block in range(0, K, BK):  # once more from the cache: fewer registers
        n = block + tl.arange(0, BK)
        g_tile = load_decays(g, first, g_row, h * K, i, n, inside, K)
        since = tl.where(reads[:, None], tl.exp2(between(spans, SINCE, i, j, g_tile, WIDE)), 0.0)
        q_tile = load_rows(q, first, q_row, h * K, i, n, inside, K)
        store_rows(q_since, q_tile.to(tl.float32) * (since * scale), first, H * K, h * K, i, n, inside, K)
        k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K).to(tl.float32)
        if k_since is not None:
            store_rows(k_since, k_tile * since, first, H * K, h * K, i, n, inside, K)
        until = tl.where(writes[:, None], tl.exp2(between(spans, UNTIL, i, j, g_tile, WIDE)) * strength[:, None], 0.0)
        store_rows(k_until, k_tile * until, first, H * K, h * K, i, n, inside, K)
        whole = tl.exp2(tl.sum(g_tile.to(tl.float32), axis=0) * LOG2E) * survives
        tl.store(total + (bh * n_chunks + chunk) * K + n, whole, mask=n < K)


@kernel("gla", configs=state_configs)
@triton.jit
def gla_states(
    keys, values, total, initial, found, final, T, H, value_row,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, REVERSE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carries the state through the chunks and keeps it as each finds it; backwards, the state's gradient."""
    n_chunks = tl.cdiv(T, C)
    n_tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % n_tiles
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    h = bh % H
    origin = (bh // H) * T
    i, n, m = tl.arange(0, C), tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    square = n[:, None] * V + m[None, :]
    in_square = (n[:, None] < K) & (m[None, :] < V)
    state = tl.zeros([KP, BV], tl.float32)
    if initial is not None:
        state = tl.load(initial + bh * K * V + square, mask=in_square, other=0.0)
    for step in range(n_chunks):
        chunk = n_chunks - 1 - step if REVERSE else step
        at = (bh * n_chunks + chunk) * K
        tl.store(found + at * V + square, state.to(found.dtype.element_ty), mask=in_square)
        inside = chunk * C + i < T
        key_at = keys + ((origin + chunk * C) * H + h) * K
        keys_t = tl.load(
            key_at + (i[None, :] * (H * K) + n[:, None]), mask=inside[None, :] & (n[:, None] < K), other=0.0
        )
        x = load_rows(values, origin + chunk * C, value_row, h * V, i, m, inside, V)
        decay = tl.load(total + at + n, mask=n < K, other=0.0)
        state = tl.dot(keys_t, x, state * decay[:, None], input_precision="ieee")
    tl.store(final + bh * K * V + square, state, mask=in_square)


@kernel("gla", configs=output_configs)
@triton.jit
def gla_outputs(
    scores, x, keys, states, out, T, H, x_row,
    K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """scores x + keys state: the outputs of a chunk, and with the transposed scores the gradient of its values."""
    n_chunks = tl.cdiv(T, C)
    n_tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % n_tiles
    chunk = (tl.program_id(0) // n_tiles) % n_chunks
    bh = (tl.program_id(0) // (n_tiles * n_chunks)).to(tl.int64)
    h = bh % H
    first = (bh // H) * T + chunk * C
    i, j, m = tl.arange(0, C), tl.arange(0, C), tile * BV + tl.arange(0, BV)
    inside = chunk * C + i < T
    pair = j[None, :] * C + i[:, None] if TRANSPOSED else i[:, None] * C + j[None, :]
    scores_tile = tl.load(scores + (bh * n_chunks + chunk) * C * C + pair)
    x_tile = load_rows(x, first, x_row, h * V, i, m, inside, V)
    found = tl.dot(scores_tile, x_tile, input_precision="ieee")
    for block in range(0, K, BK):
        n = block + tl.arange(0, BK)
        keys_tile = load_rows(keys, first, H * K, h * K, i, n, inside, K)
        square = n[:, None] * V + m[None, :]
        state = tl.load(
            states + (bh * n_chunks + chunk) * K * V + square,
            mask=(n[:, None] < K) & (m[None, :] < V),
            other=0.0,
        )
        found = tl.dot(keys_tile, state, found, input_precision="ieee")
    store_rows(out, found, first, H * V, h * V, i, m, inside, V)


@kernel("gla", configs=score_configs)
@triton.jit
def gla_score_gradients(
    v, do, dr, seq_idx, d_scores, d_overlaps, scale, T, H, v_row, do_row, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients [C, C] of the scores of a chunk, and with `dr` of the overlaps, as `gla_gradients` takes them."""
    n_chunks = tl.cdiv(T, C)
    chunk = tl.program_id(0) % n_chunks
    bh = (tl.program_id(0) // n_chunks).to(tl.int64)
    h = bh % H
    start = chunk * C
    first = (bh // H) * T + start
    i, j = tl.arange(0, C), tl.arange(0, C)
    inside = start + i < T
    found = tl.zeros([C, C], tl.float32)
    found_k = tl.zeros([C, C], tl.float32)
    for block in range(0, V, BV):
        m = block + tl.arange(0, BV)
        v_tile = load_rows(v, first, v_row, h * V, i, m, inside, V)
        do_tile = load_rows(do, first, do_row, h * V, i, m, inside, V)
        found = tl.dot(do_tile, tl.trans(v_tile), found, input_precision="ieee")
        if dr is not None:
            dr_tile = load_rows(dr, first, H * V, h * V, i, m, inside, V)
            found_k = tl.dot(dr_tile, tl.trans(v_tile), found_k, input_precision="ieee")
    met = i[:, None] >= j[None, :]
    if seq_idx is not None:
        doc = tl.load(seq_idx + first + i, mask=inside, other=-1)
        doc_j = tl.load(seq_idx + first + j, mask=start + j < T, other=-1)
        met = met & (doc[:, None] == doc_j[None, :])
    at = (bh * n_chunks + chunk) * C * C + i[:, None] * C + j[None, :]
    tl.store(d_scores + at, tl.where(met, found * scale, 0.0).to(d_scores.dtype.element_ty))
    if dr is not None:
        tl.store(d_overlaps + at, tl.where(met, 0.0 - found_k, 0.0).to(d_overlaps.dtype.element_ty))


@kernel("gla", configs=gradient_configs)
@triton.jit
def gla_gradients(
    q, k, v, g, beta, seq_idx, spans, do, dr, d_scores, d_overlaps, states, state_grads, dq, dk, dg, d_beta,
    scale, T, H, q_row, k_row, v_row, g_row, do_row, beta_row,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and g in a chunk, from the states that it found and the gradient of the state that it left.

    With `dr` [B, T, H, V], the gradient of what k took from the state and from earlier tokens of v, and then the
    gradient of `beta` [tiles of K, B, T, H] by tiles.
    """
    WIDE: tl.constexpr = q.dtype.element_ty == tl.float32
    HALF: tl.constexpr = q.dtype.element_ty == tl.float16
    n_chunks = tl.cdiv(T, C)
    n_tiles: tl.constexpr = (K + BK - 1) // BK
    tile = tl.program_id(0) % n_tiles
    chunk = (tl.program_id(0) // n_tiles) % n_chunks
    bh = (tl.program_id(0) // (n_tiles * n_chunks)).to(tl.int64)
    n_heads = tl.num_programs(0) // (n_tiles * n_chunks)  # B H
    h = bh % H
    origin = (bh // H) * T
    start = chunk * C
    first = origin + start
    i, j, n = tl.arange(0, C), tl.arange(0, C), tile * BK + tl.arange(0, BK)
    inside = start + i < T
    base = (bh * n_chunks + chunk) * K * V
    pairs_at = (bh * n_chunks + chunk) * C * C
    square, flipped = i[:, None] * C + j[None, :], j[None, :] * C + i[:, None]
    reads, writes, survives, begins = inside, inside, 1.0, i < 0
    if seq_idx is not None:
        doc, before, last = documents(seq_idx, origin, start, i, inside, T)
        doc_j = tl.load(seq_idx + first + j, mask=start + j < T, other=-1)
        reads, writes, survives = reads & (doc == before), writes & (doc == last), tl.where(before == last, 1.0, 0.0)
        begins = start + i > 0
        begins = begins & (doc != tl.load(seq_idx + first + i - 1, mask=inside & begins, other=-1))

    # What pairs of tokens owe to each other.
    dq_tile = tl.zeros([C, BK], tl.float32)
    dk_tile = tl.zeros([C, BK], tl.float32)
    d_strength = tl.zeros([C], tl.float32)
    passing = tl.zeros([C, BK], tl.float32)
    level = LEVELS - 1
    while level >= 0:
        g_tile = load_decays(g, first, g_row, h * K, i, n, inside, K)
        up, down, weak = factors(between(spans, level, i, j, g_tile, WIDE), i, level, HALF)
        q_tile = load_rows(q, first, q_row, h * K, i, n, inside, K)
        k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K)
        before_it, after_it = met_before(i, level, weak), met_after(i, level, weak)
        strength = strengths(beta, first, beta_row, h, i, inside)[:, None]
        earlier = (k_tile.to(tl.float32) * (down * strength)).to(k_tile.dtype)
        pair = tl.where(within(j, before_it), tl.load(d_scores + pairs_at + square), 0.0)
        found = tl.dot(pair, earlier, input_precision="ieee")
        dq_tile += up * found
        later = (q_tile.to(tl.float32) * up).to(q_tile.dtype)
        passing += later.to(tl.float32) * found
        pair_t = tl.where(within(j, after_it), tl.load(d_scores + pairs_at + flipped), 0.0)
        d_earlier = tl.dot(pair_t, later, input_precision="ieee")
        if dr is not None:
            tl.debug_barrier()  # else the loads below are brought forward, and there are no registers for them
            pair = tl.where(within(j, before_it), tl.load(d_overlaps + pairs_at + square), 0.0)
            found = tl.dot(pair, earlier, input_precision="ieee")
            dk_tile += up * found
            later = (k_tile.to(tl.float32) * up).to(k_tile.dtype)
            passing += later.to(tl.float32) * found
            pair_t = tl.where(within(j, after_it), tl.load(d_overlaps + pairs_at + flipped), 0.0)
            d_earlier = tl.dot(pair_t, later, d_earlier, input_precision="ieee")
            tl.debug_barrier()
            k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K)  # again: it would be spilled meanwhile
        d_written = down * d_earlier
        dk_tile += strength * d_written
        if beta is not None:
            d_strength += tl.sum(k_tile.to(tl.float32) * d_written, axis=1)
        passing -= earlier.to(tl.float32) * d_earlier
        level = tl.where(weak, -1, level - 1)

    # What the outputs, and what k reads, owe to the state that the chunk found.
    dq_state = tl.zeros([C, BK], tl.float32)
    dk_state = tl.zeros([C, BK], tl.float32)
    for block in range(0, V, BV):
        m = block + tl.arange(0, BV)
        square_kv = n[None, :] * V + m[:, None]  # [BV, BK], transposed
        state = tl.load(states + base + square_kv, mask=(n[None, :] < K) & (m[:, None] < V), other=0.0)
        do_tile = load_rows(do, first, do_row, h * V, i, m, inside, V)
        dq_state = tl.dot(do_tile, state, dq_state, input_precision="ieee")
        if dr is not None:
            dr_tile = load_rows(dr, first, H * V, h * V, i, m, inside, V)
            dk_state = tl.dot(dr_tile, state, dk_state, input_precision="ieee")
    g_tile = load_decays(g, first, g_row, h * K, i, n, inside, K)  # again and again: registers are scarce
    since = tl.where(reads[:, None], tl.exp2(between(spans, SINCE, i, j, g_tile, WIDE)), 0.0)
    dq_state *= since * scale
    dk_state *= since
    dq_tile += dq_state
    dk_tile -= dk_state

    # A decay acts on whatever passes it: what token i reads began before it, what token j writes ends behind it. A pair
    # counts for both with the same rounded factors, else the difference of large sums would hold what was rounded off;
    # the pair of a token with itself passes no decay and is left out.
    q_tile = load_rows(q, first, q_row, h * K, i, n, inside, K).to(tl.float32)
    k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K).to(tl.float32)
    written = k_tile * strengths(beta, first, beta_row, h, i, inside)[:, None]
    passing += q_tile * dq_state
    if dr is not None:
        passing -= k_tile * dk_state
    onwards = tl.load(spans + SINCE * C * C + flipped)  # itself and later tokens
    if seq_idx is not None:
        onwards = tl.where(doc[:, None] == doc_j[None, :], onwards, 0.0)
    d_decay = sums(onwards, passing, WIDE)
    d_own = tl.load(d_scores + pairs_at + i * (C + 1)).to(tl.float32)  # of the score of a token with itself
    store_rows(dq, dq_tile + d_own[:, None] * written, first, H * K, h * K, i, n, inside, K)
    d_written = d_own[:, None] * q_tile
    dk_tile += strengths(beta, first, beta_row, h, i, inside)[:, None] * d_written
    if beta is not None:
        d_strength += tl.sum(k_tile * d_written, axis=1)

    # What the state that the chunk leaves owes to its tokens and to the state that the chunk found.
    dk_state = tl.zeros([C, BK], tl.float32)
    kept = tl.zeros([BK], tl.float32)
    for block in range(0, V, BV):
        m = block + tl.arange(0, BV)
        square_kv = n[None, :] * V + m[:, None]
        in_square = (n[None, :] < K) & (m[:, None] < V)
        d_state = tl.load(state_grads + base + square_kv, mask=in_square, other=0.0)
        state = tl.load(states + base + square_kv, mask=in_square, other=0.0)
        kept += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=0)
        v_tile = load_rows(v, first, v_row, h * V, i, m, inside, V)
        dk_state = tl.dot(v_tile, d_state, dk_state, input_precision="ieee")
    g_tile = load_decays(g, first, g_row, h * K, i, n, inside, K)
    until = tl.exp2(between(spans, UNTIL, i, j, g_tile, WIDE))
    dk_state = tl.where(writes[:, None], dk_state * until, 0.0)
    k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K).to(tl.float32)
    sooner = tl.load(spans + UNTIL * C * C + flipped)  # earlier tokens
    strength = strengths(beta, first, beta_row, h, i, inside)
    d_decay += sums(sooner, k_tile * strength[:, None] * dk_state, WIDE)
    whole = tl.exp2(tl.sum(g_tile.to(tl.float32), axis=0) * LOG2E) * survives
    d_decay = tl.where(begins[:, None], 0.0, d_decay + (kept * whole)[None, :])
    store_rows(dg, d_decay, first, H * K, h * K, i, n, inside, K)
    if beta is not None:
        d_strength += tl.sum(k_tile * dk_state, axis=1)
        part = tile.to(tl.int64) * n_heads * T + (first + i) * H + h
        tl.store(d_beta + part, d_strength, mask=inside)
    store_rows(dk, dk_tile + strength[:, None] * dk_state, first, H * K, h * K, i, n, inside, K)


@kernel("gla", configs=lambda arguments: grid(BV=(16, 32, 64), num_warps=(4, 2), num_stages=(1,)))
@triton.jit
def gla_step_kernel(
    q, k, v, g, state, new_state, o, scale, H, q_row, k_row, v_row, g_row,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token: the state is read and written once. Rows are those of [B, H D]; new_state may be state."""
    n_tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % n_tiles
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    n, m = tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    square = bh * K * V + n[:, None] * V + m[None, :]
    in_square = (n < K)[:, None] & (m < V)[None, :]
    q_row_of = tl.load(q + b * q_row + h * K + n, mask=n < K, other=0.0).to(tl.float32) * scale
    k_row_of = tl.load(k + b * k_row + h * K + n, mask=n < K, other=0.0).to(tl.float32)
    g_row_of = tl.load(g + b * g_row + h * K + n, mask=n < K, other=0.0).to(tl.float32)
    v_row_of = tl.load(v + b * v_row + h * V + m, mask=m < V, other=0.0).to(tl.float32)
    found = tl.load(state + square, mask=in_square, other=0.0)
    found = found * tl.exp2(g_row_of * LOG2E)[:, None] + k_row_of[:, None] * v_row_of[None, :]
    tl.store(new_state + square, found, mask=in_square)
    read = tl.sum(found * q_row_of[:, None], axis=0)
    tl.store(o + bh * V + m, read.to(o.dtype.element_ty), mask=m < V)
