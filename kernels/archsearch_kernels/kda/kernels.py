"""Device code of Kimi delta attention (2510.26692): the delta rule on gated linear attention's kernels.

Of every token k is what it reads the state with and beta k what it writes it with. In a chunk that finds S,

    y = (I + A)^-1 (v - (k since) S)         A_ij = k_i . decay(j to i) beta_j k_j, j < i
    o = (q since) S + P y                    P_ij = scale q_i . decay(j to i) beta_j k_j, j <= i
    S' = total S + (beta k until)^T y

P, A and the decayed q and k are made by `gla_intra`, o by `gla_outputs`. Backwards, with Y = (I + A)^-1,

    dr = Y^T (P^T do + (beta k until) dS')   dS = total dS' + (q since)^T do - (k since)^T dr

dv is dr and dA is -dr y^T; `gla_gradients` makes of these the gradients of q, k, beta and g.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.delta_rule.kernels.inverse import unit_lower_inverse
from archsearch_kernels.device_math import softplus
from archsearch_kernels.gla.kernels.decays import CHUNK, LOG2E, C, load_rows, store_rows
from archsearch_kernels.launch import Arguments, Config, grid, kernel


def walk_configs(arguments: Arguments) -> list[Config]:
    """Narrow tiles, so that there are programs enough; as many stages as fit: the walk is a chain."""
    size, KP, V = arguments["x"].element_size(), arguments["KP"], arguments["V"]
    if size == 4:
        return grid(BV=(16,), num_warps=(8, 4), num_stages=(1,))
    tiles = (16,) if V <= 16 or KP > 128 else (32, 16)
    tall, square = (3, 2) if arguments["REVERSE"] else (2, 1)  # loads of a step: [C, K] and [C, C]
    fitting = [s for s in (3, 2, 1) if s * size * CHUNK * (tall * KP + square * CHUNK + tiles[0]) < 210_000]
    return grid(BV=tiles, num_warps=(4, 8), num_stages=tuple(fitting[:2]))


@kernel("kda", configs=grid(num_warps=(4, 8), num_stages=(1,)))
@triton.jit
def kda_inverse(overlaps, inverses):
    """Y = (I + A)^-1 of every chunk [C, C]."""
    at = tl.program_id(0).to(tl.int64) * C * C + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(inverses + at, unit_lower_inverse(tl.load(overlaps + at), C).to(inverses.dtype.element_ty))


@kernel("kda", configs=walk_configs)
@triton.jit
def kda_walk(
    v, reads, writes, inverses, scores, queries, total, initial, x, found, final, T, H, v_row,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, REVERSE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carries the state through the chunks: x = Y (v - reads S) and S' = total S + writes^T x, S kept as found.

    Backwards S is the state's gradient, v that of the outputs: x = Y^T (scores^T v + reads S) and
    S' = total S + queries^T v - writes^T x. Forwards scores and queries are None.
    """
    n_chunks = tl.cdiv(T, C)
    n_tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % n_tiles
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    h = bh % H
    origin = (bh // H) * T
    i, j, n, m = tl.arange(0, C), tl.arange(0, C), tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    square = n[:, None] * V + m[None, :]
    in_square = (n[:, None] < K) & (m[None, :] < V)
    flipped = i[None, :] * (H * K) + n[:, None]  # of [C, K], as [K, C]
    pair = j[None, :] * C + i[:, None] if REVERSE else i[:, None] * C + j[None, :]
    state = tl.zeros([KP, BV], tl.float32)
    if initial is not None:
        state = tl.load(initial + bh * K * V + square, mask=in_square, other=0.0)
    for step in range(n_chunks):
        chunk = n_chunks - 1 - step if REVERSE else step
        at = (bh * n_chunks + chunk) * K
        pairs_at = (bh * n_chunks + chunk) * C * C
        first = origin + chunk * C
        inside = chunk * C + i < T
        in_flipped = inside[None, :] & (n[:, None] < K)
        held = state.to(v.dtype.element_ty)
        tl.store(found + at * V + square, held, mask=in_square)
        rows_v = load_rows(v, first, v_row, h * V, i, m, inside, V)
        rows_read = load_rows(reads, first, H * K, h * K, i, n, inside, K)
        rows = tl.dot(rows_read, held, input_precision="ieee")
        if REVERSE:
            rows = tl.dot(tl.load(scores + pairs_at + pair), rows_v, rows, input_precision="ieee")
        else:
            rows = rows_v.to(tl.float32) - rows
        rows = tl.dot(tl.load(inverses + pairs_at + pair), rows.to(held.dtype), input_precision="ieee")
        store_rows(x, rows, first, H * V, h * V, i, m, inside, V)
        state = state * tl.load(total + at + n, mask=n < K, other=0.0)[:, None]
        if REVERSE:
            queries_t = tl.load(queries + (first * H + h) * K + flipped, mask=in_flipped, other=0.0)
            state = tl.dot(queries_t, rows_v, state, input_precision="ieee")
            rows = -rows
        writes_t = tl.load(writes + (first * H + h) * K + flipped, mask=in_flipped, other=0.0)
        state = tl.dot(writes_t, rows.to(held.dtype), state, input_precision="ieee")
    tl.store(final + bh * K * V + square, state, mask=in_square)


@kernel("kda", configs=lambda arguments: grid(BV=(16, 32, 64), num_warps=(4, 2), num_stages=(1,)))
@triton.jit
def kda_step_kernel(
    q, k, v, beta, g, A_log, dt_bias, state, new_state, o, scale, eps, H, q_row, k_row, v_row, beta_row, g_row,
    RAW: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token: the state is read and written once. Rows are those of [B, H D]; new_state may be state.

    RAW: q and k of any length, beta and g as projected; g then decays by -e^A_log softplus(g + dt_bias).
    """
    n_tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % n_tiles
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    n, m = tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    square = bh * K * V + n[:, None] * V + m[None, :]
    in_square = (n < K)[:, None] & (m < V)[None, :]
    query = tl.load(q + b * q_row + h * K + n, mask=n < K, other=0.0).to(tl.float32)
    key = tl.load(k + b * k_row + h * K + n, mask=n < K, other=0.0).to(tl.float32)
    log_decay = tl.load(g + b * g_row + h * K + n, mask=n < K, other=0.0).to(tl.float32)
    value = tl.load(v + b * v_row + h * V + m, mask=m < V, other=0.0).to(tl.float32)
    strength = tl.load(beta + b * beta_row + h).to(tl.float32)
    if RAW:
        query *= tl.rsqrt(tl.sum(query * query, axis=0) + eps)
        key *= tl.rsqrt(tl.sum(key * key, axis=0) + eps)
        strength = tl.sigmoid(strength)
        rate = tl.exp(tl.load(A_log + h).to(tl.float32))
        log_decay = -rate * softplus(log_decay + tl.load(dt_bias + h * K + n, mask=n < K, other=0.0).to(tl.float32))
    query *= scale
    decay = tl.exp2(log_decay * LOG2E)
    found = tl.load(state + square, mask=in_square, other=0.0) * decay[:, None]
    write = strength * (value - tl.sum(found * key[:, None], axis=0))
    found += key[:, None] * write[None, :]
    tl.store(new_state + square, found, mask=in_square)
    read = tl.sum(found * query[:, None], axis=0)
    tl.store(o + bh * V + m, read.to(o.dtype.element_ty), mask=m < V)
