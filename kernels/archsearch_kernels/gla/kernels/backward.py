"""Gradients in a chunk: of the scores (`gla_score_gradients`), and by them of q, k, g and beta (`gla_gradients`).

As in `forward`, what only kda needs has arguments that may be None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.gla.kernels.decays import (
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


def score_configs(arguments: Arguments) -> list[Config]:
    if arguments["v"].element_size() == 4:
        return grid(BV=(32,), num_warps=(8, 4), num_stages=(1,))
    return grid(BV=(32 if arguments["V"] <= 32 else 64,), num_warps=(4,), num_stages=(1, 2))


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


def gradient_configs(arguments: Arguments) -> list[Config]:
    """All values at once where they fit: every step of a loop over them waits for its loads."""
    if arguments["q"].element_size() == 4:
        return grid(BV=(32,), num_warps=(8, 4), num_stages=(1,))
    V = arguments["V"]
    return grid(BV=(32,) if V <= 32 else (64,) if V <= 64 else (128, 64), num_warps=(4,), num_stages=(1,))


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
