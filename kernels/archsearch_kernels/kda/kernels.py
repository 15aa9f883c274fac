"""Device code of Kimi delta attention (2510.26692): the delta rule on gated linear attention's kernels.

Of every token k is what it reads the state with and m = beta k what it writes it with. In a chunk that finds S,

    y = (I + A)^-1 (v - (k since) S)      A_ij = k_i . decay(j to i) m_j, j < i       o = (q since) S + P y
    S' = total S + (m until)^T y          P_ij = scale q_i . decay(j to i) m_j, j <= i

P and A are the scores of two gated linear attentions that write the same keys, and so are their gradients: `gla_intra`
and `gla_gradients` serve the one of q, the kernels here what the one of k adds. Y = (I + A)^-1 is applied to all
chunks at once, so that the walk over chunks is y = Y v - (Y k since) S, and backwards, with dr = dv = Y^T dy,

    dr = Y^T P^T do + (Y^T m until) dS'   dS = total dS' + (q since)^T do - (k since)^T dr        dA = -dr y^T
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.delta_rule.kernels import unit_lower_inverse
from archsearch_kernels.gla.kernels import (
    LOG2E,
    SINCE,
    C,
    load_decays,
    load_rows,
    pair_gradients,
    state_gradient,
    store_rows,
    sums,
)
from archsearch_kernels.launch import Arguments, Config, grid, kernel


def solve_configs(arguments: Arguments) -> list[Config]:
    wide = arguments["v"].element_size() == 4
    if wide:
        return grid(BD=(32,), num_warps=(8, 4), num_stages=(1,))
    return grid(BD=(64, 128), num_warps=(4,), num_stages=(1, 2))


def walk_configs(arguments: Arguments) -> list[Config]:
    if arguments["u"].element_size() == 4:
        return grid(BV=(16,), num_warps=(8, 4), num_stages=(1,))
    tiles = (16,) if arguments["V"] <= 16 or arguments["K"] > 128 else (32, 16)
    found = grid(BV=tiles, num_warps=(4, 8), num_stages=(2, 3, 1))
    # 8 warps without a pipeline give wrong gradients at K = 64 (triton 3.6.0, ptxas 12.8, H100)
    return [c for c in found if (c["num_warps"], c["num_stages"]) != (8, 1)]


def gradient_configs(arguments: Arguments) -> list[Config]:
    wide = arguments["q"].element_size() == 4
    if wide:
        return grid(BV=(32,), num_warps=(8, 4), num_stages=(1,))
    return grid(BV=(32 if arguments["V"] <= 32 else 64,), num_warps=(4,), num_stages=(1, 2))


@kernel("kda", configs=grid(num_warps=(4, 8), num_stages=(1,)))
@triton.jit
def kda_inverse(overlaps, inverses):
    """Y = (I + A)^-1 of every chunk [C, C]."""
    at = tl.program_id(0).to(tl.int64) * C * C + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(inverses + at, unit_lower_inverse(tl.load(overlaps + at), C).to(inverses.dtype.element_ty))


@kernel("kda", configs=solve_configs)
@triton.jit
def kda_solve(
    inverses, scores, v, keys, u, w, T, H, v_row, K: tl.constexpr, V: tl.constexpr, REVERSE: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """u = Y v and w = -Y keys in every chunk; REVERSE: u = Y^T P^T v and w = Y^T keys."""
    n_chunks = tl.cdiv(T, C)
    v_tiles: tl.constexpr = (V + BD - 1) // BD
    n_tiles: tl.constexpr = v_tiles + (K + BD - 1) // BD
    tile = tl.program_id(0) % n_tiles
    chunk = (tl.program_id(0) // n_tiles) % n_chunks
    bh = (tl.program_id(0) // (n_tiles * n_chunks)).to(tl.int64)
    h = bh % H
    first = (bh // H) * T + chunk * C
    i, j = tl.arange(0, C), tl.arange(0, C)
    inside = chunk * C + i < T
    pair = j[None, :] * C + i[:, None] if REVERSE else i[:, None] * C + j[None, :]
    square = (bh * n_chunks + chunk) * C * C + pair
    y = tl.load(inverses + square)
    if tile < v_tiles:
        m = tile * BD + tl.arange(0, BD)
        x = load_rows(v, first, v_row, h * V, i, m, inside, V)
        if REVERSE:
            x = tl.dot(tl.load(scores + square), x, input_precision="ieee").to(x.dtype)
        store_rows(u, tl.dot(y, x, input_precision="ieee"), first, H * V, h * V, i, m, inside, V)
    else:
        n = (tile - v_tiles) * BD + tl.arange(0, BD)
        x = load_rows(keys, first, H * K, h * K, i, n, inside, K)
        found = tl.dot(y, x, input_precision="ieee")
        store_rows(w, found if REVERSE else -found, first, H * K, h * K, i, n, inside, K)


@kernel("kda", configs=walk_configs)
@triton.jit
def kda_walk(
    u, w, keys, total, initial, x, found, final, queries, do, T, H, do_row,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, REVERSE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carries the state through the chunks: x = u + w S and S' = total S + keys^T x, S kept as each chunk finds it.

    Backwards S is the state's gradient and S' = total S + queries^T do - keys^T x.
    """
    n_chunks = tl.cdiv(T, C)
    n_tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % n_tiles
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    h = bh % H
    origin = (bh // H) * T
    i, n, m = tl.arange(0, C), tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    square = n[:, None] * V + m[None, :]
    in_square = (n < K)[:, None] & (m < V)[None, :]
    flipped = i[None, :] * (H * K) + n[:, None]  # of keys, [K, C]
    state = tl.zeros([KP, BV], tl.float32)
    if initial is not None:
        state = tl.load(initial + bh * K * V + square, mask=in_square, other=0.0)
    for step in range(n_chunks):
        chunk = n_chunks - 1 - step if REVERSE else step
        at = (bh * n_chunks + chunk) * K
        first = origin + chunk * C
        inside = chunk * C + i < T
        in_flipped = inside[None, :] & (n < K)[:, None]
        held = state.to(u.dtype.element_ty)
        tl.store(found + at * V + square, held, mask=in_square)
        rows_u = load_rows(u, first, H * V, h * V, i, m, inside, V)
        rows_w = load_rows(w, first, H * K, h * K, i, n, inside, K)
        rows_x = rows_u.to(tl.float32) + tl.dot(rows_w, held, input_precision="ieee")
        store_rows(x, rows_x, first, H * V, h * V, i, m, inside, V)
        state = state * tl.load(total + at + n, mask=n < K, other=0.0)[:, None]
        keys_t = tl.load(keys + (first * H + h) * K + flipped, mask=in_flipped, other=0.0)
        if REVERSE:
            rows_do = load_rows(do, first, do_row, h * V, i, m, inside, V)
            queries_t = tl.load(queries + (first * H + h) * K + flipped, mask=in_flipped, other=0.0)
            state = tl.dot(queries_t, rows_do, state, input_precision="ieee")
            rows_x = -rows_x
        state = tl.dot(keys_t, rows_x.to(held.dtype), state, input_precision="ieee")
    tl.store(final + bh * K * V + square, state, mask=in_square)


@kernel("kda", configs=gradient_configs)
@triton.jit
def kda_gradients(
    q, k, v, g, seq_idx, spans, do, states, beta, dk, dk_before, dg, dg_before, d_beta, T, H,
    q_row, k_row, g_row, beta_row,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Adds what the reading of k does to the gradients: q is k here, k is m = beta k, v is y and do is dr.

    *_before: gradients of m and g that the outputs caused. Writes the whole gradients of k and g, and of beta
    [tiles of K, B, T, H] by tiles.
    """
    WIDE: tl.constexpr = q.dtype.element_ty == tl.float32
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
    g_tile = load_decays(g, first, g_row, h * K, i, n, inside, K)
    dq_pairs, dk_pairs, _own = pair_gradients(
        q, k, v, g_tile, seq_idx, spans, do, -1.0, first, start, T, h, q_row, k_row, H * V, H * V, i, j, n, inside,
        K, V, BK, BV, WIDE,
    )  # fmt: skip
    base = (bh * n_chunks + chunk) * K * V
    dq_all = dq_pairs + state_gradient(
        do, states + base, g_tile, seq_idx, spans, -1.0, origin, start, T, h, H * V, i, j, n, inside, K, V, BK, BV, WIDE
    )
    q_tile = load_rows(q, first, q_row, h * K, i, n, inside, K).to(tl.float32)
    k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K).to(tl.float32)
    onwards = tl.load(spans + SINCE * C * C + j[None, :] * C + i[:, None])
    begins = i < 0
    if seq_idx is not None:
        doc = tl.load(seq_idx + first + i, mask=inside, other=-1)
        doc_j = tl.load(seq_idx + first + j, mask=start + j < T, other=-1)
        onwards = tl.where(doc[:, None] == doc_j[None, :], onwards, 0.0)
        begins = start + i > 0
        begins = begins & (doc != tl.load(seq_idx + first + i - 1, mask=inside & begins, other=-1))
    d_decay = tl.where(begins[:, None], 0.0, sums(onwards, q_tile * dq_all - k_tile * dk_pairs, WIDE))
    d_decay += load_rows(dg_before, first, H * K, h * K, i, n, inside, K)
    store_rows(dg, d_decay, first, H * K, h * K, i, n, inside, K)

    d_written = dk_pairs + load_rows(dk_before, first, H * K, h * K, i, n, inside, K).to(tl.float32)
    strength = tl.load(beta + (first + i) * beta_row + h, mask=inside, other=0.0).to(tl.float32)
    store_rows(dk, dq_all + strength[:, None] * d_written, first, H * K, h * K, i, n, inside, K)
    q_tile = load_rows(q, first, q_row, h * K, i, n, inside, K).to(tl.float32)
    part = tile.to(tl.int64) * n_heads * T + (first + i) * H + h
    tl.store(d_beta + part, tl.sum(q_tile * d_written, axis=1), mask=inside)


@kernel("kda", configs=lambda arguments: grid(BV=(16, 32, 64), num_warps=(4, 2), num_stages=(1,)))
@triton.jit
def kda_step_kernel(
    q, k, v, beta, g, state, new_state, o, scale, H, q_row, k_row, v_row, beta_row, g_row,
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
    query = tl.load(q + b * q_row + h * K + n, mask=n < K, other=0.0).to(tl.float32) * scale
    key = tl.load(k + b * k_row + h * K + n, mask=n < K, other=0.0).to(tl.float32)
    decay = tl.exp2(tl.load(g + b * g_row + h * K + n, mask=n < K, other=0.0).to(tl.float32) * LOG2E)
    value = tl.load(v + b * v_row + h * V + m, mask=m < V, other=0.0).to(tl.float32)
    strength = tl.load(beta + b * beta_row + h).to(tl.float32)
    found = tl.load(state + square, mask=in_square, other=0.0) * decay[:, None]
    write = strength * (value - tl.sum(found * key[:, None], axis=0))
    found += key[:, None] * write[None, :]
    tl.store(new_state + square, found, mask=in_square)
    read = tl.sum(found * query[:, None], axis=0)
    tl.store(o + bh * V + m, read.to(o.dtype.element_ty), mask=m < V)
