"""Forward: the pairs of every chunk (`gla_intra`), the states (`gla_states`), the outputs (`gla_outputs`).

The pairs of a chunk and their gradients are those of the delta rule with such decays (kda) too: there token j writes
beta_j k_j, and is itself read with k before it writes. What only that needs has arguments that may be None.
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
    met_before,
    store_rows,
    strengths,
    within,
)
from archsearch_kernels.launch import Arguments, Config, grid, kernel


def intra_configs(arguments: Arguments) -> list[Config]:
    """Narrow tiles: the scores take most of the registers."""
    if arguments["q"].element_size() == 4:
        return grid(BK=(32,), num_warps=(8, 4), num_stages=(1,))
    return grid(BK=(32,), num_warps=(4,), num_stages=(1, 2)) + grid(BK=(64,), num_warps=(8,), num_stages=(1,))


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


def state_configs(arguments: Arguments) -> list[Config]:
    if arguments["values"].element_size() == 4:
        return grid(BV=(16,), num_warps=(8, 4), num_stages=(1, 2))
    if arguments["V"] <= 16:
        return grid(BV=(16,), num_warps=(4, 8), num_stages=(3, 2))
    return grid(BV=(32, 16, 64), num_warps=(4, 8), num_stages=(3, 2))


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


def output_configs(arguments: Arguments) -> list[Config]:
    V, wide = arguments["V"], arguments["x"].element_size() == 4
    if V <= 32:
        return grid(BV=(16 if V <= 16 else 32,), BK=(64,), num_warps=(4,), num_stages=(1, 2))
    if wide:
        return grid(BV=(32,), BK=(64, 32), num_warps=(8,), num_stages=(1, 2))
    found = grid(BV=(64,), BK=(64,), num_warps=(4,), num_stages=(2, 3))
    return grid(BV=(128,), BK=(64,), num_warps=(4, 8), num_stages=(2, 3)) + found if V > 64 else found


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
