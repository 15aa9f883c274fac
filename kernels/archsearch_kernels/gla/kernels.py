"""Device code of gated linear attention (2312.06635): four kernels over chunks of 64 tokens, and the decode step.

Two tokens of a chunk meet under a decay of their own for every feature. A chunk is halved again and again: the decay
from a token of a left half to one of the right half is (to the middle) times (from the middle), both at most one, so
every pair is one entry of one matrix product in which no exponent is positive. The exponents are products too, of a
matrix of ones and zeros with the log decays: sums of what lies between, never differences, exact for any strength.
Those matrices come as a table, `spans`: to compute them took as long as all the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.launch import Arguments, Config, grid, kernel

CHUNK = 64  # tokens; the shapes of the intermediates follow it
C = tl.constexpr(CHUNK)
LEVELS = tl.constexpr(6)  # halvings of a chunk
UNTIL, SINCE = tl.constexpr(6), tl.constexpr(7)  # behind them in the table
LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-104.0)  # e^-104 is 0 in float32; a number of bfloat16, and no infinity to subtract


def intra_configs(arguments: Arguments) -> list[Config]:
    wide = arguments["q"].element_size() == 4
    if wide:
        return grid(BK=(32,), num_warps=(8, 4), num_stages=(1,))
    found = grid(BK=(64,), num_warps=(4,), num_stages=(1, 2))
    return found + grid(BK=(128,), num_warps=(4,), num_stages=(1, 2)) if 64 < arguments["K"] <= 128 else found


def gradient_configs(arguments: Arguments) -> list[Config]:
    wide = arguments["q"].element_size() == 4
    if wide:
        return grid(BK=(32,), BV=(32,), num_warps=(8, 4), num_stages=(1,))
    return grid(BK=(64,), BV=(32 if arguments["V"] <= 32 else 64,), num_warps=(4,), num_stages=(1, 2))


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


@triton.jit
def sums(ones, x, WIDE: tl.constexpr):
    """Rows of x [C, N] added up where `ones` [C, C] has them; in float32, or nearly (16 bits) for 16-bit operands."""
    if x.dtype == tl.bfloat16:
        return tl.dot(ones, x)
    if WIDE:
        return tl.dot(ones.to(tl.float32), x, input_precision="ieee")
    coarse = x.to(tl.bfloat16)
    return tl.dot(ones, (x - coarse.to(tl.float32)).to(tl.bfloat16), tl.dot(ones, coarse))


@triton.jit
def decay_over(spans, level, i, j, g, WIDE: tl.constexpr):
    """[C, N]. Levels 0 to 5: in blocks of 2^(level + 1) tokens from the left half's tokens to the middle, and from
    there to the right half's. UNTIL: from each token to the chunk's end. SINCE: from before the chunk to each token."""
    ones = tl.load(spans + level * C * C + i[:, None] * C + j[None, :])
    return tl.exp2(sums(ones, g, WIDE) * LOG2E)


@triton.jit
def across(level, i, j):
    """[C, C]: the tokens that meet at this level, in the two halves of a block; in both directions."""
    return ((i >> level)[:, None] ^ (j >> level)[None, :]) == 1


@triton.jit
def load_rows(x, first, row, column, i, n, inside, WIDTH: tl.constexpr):
    """A tile [C, N] of a tensor [B, T, H, D]: tokens from `first` on, features from `column` of a row on."""
    x += first * row + column  # 64 bits once, 32 for every lane
    return tl.load(x + (i[:, None] * row + n[None, :]), mask=inside[:, None] & (n[None, :] < WIDTH), other=0.0)


@triton.jit
def load_decays(g, first, row, column, i, n, inside, WIDTH: tl.constexpr):
    """Log decays, none below FLOOR, in bfloat16 if they came so and else in float32."""
    tile = tl.maximum(load_rows(g, first, row, column, i, n, inside, WIDTH).to(tl.float32), FLOOR)
    if g.dtype.element_ty == tl.bfloat16:
        tile = tile.to(tl.bfloat16)
    return tile


@triton.jit
def load_halves(x, y, first, x_row, y_row, column, level, i, n, inside, WIDTH: tl.constexpr):
    """A tile [C, N] with the right halves' tokens from x and the left halves' from y."""
    x += first * x_row + column
    y += first * y_row + column
    right = ((i >> level) & 1)[:, None] == 1
    at = tl.where(right, x + (i[:, None] * x_row + n[None, :]), y + (i[:, None] * y_row + n[None, :]))
    return tl.load(at, mask=inside[:, None] & (n[None, :] < WIDTH), other=0.0)


@triton.jit
def store_rows(x, tile, first, row, column, i, n, inside, WIDTH: tl.constexpr):
    x += first * row + column
    tl.store(
        x + (i[:, None] * row + n[None, :]), tile.to(x.dtype.element_ty), mask=inside[:, None] & (n[None, :] < WIDTH)
    )


@triton.jit
def documents(seq_idx, origin, start, i, inside, T):
    """Of a chunk: each token's document, and those of the tokens before the chunk and at its end."""
    doc = tl.load(seq_idx + origin + start + i, mask=inside, other=-1)
    before = tl.load(seq_idx + origin + tl.maximum(start - 1, 0))
    last = tl.load(seq_idx + origin + tl.minimum(start + C, T) - 1)
    return doc, before, last


@kernel("gla", configs=intra_configs)
@triton.jit
def gla_intra(
    q, k, g, seq_idx, spans, scores, q_since, k_until, total, scale, T, H, q_row, k_row, g_row,
    K: tl.constexpr, STRICT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What a chunk needs of itself: scores [C, C] of its pairs, q and k decayed to its start and end, its own decay.

    Documents are told apart here: what another document's state would meet is written as 0. STRICT: no token meets
    itself. k_until and total may be None.
    """
    WIDE: tl.constexpr = q.dtype.element_ty == tl.float32
    n_chunks = tl.cdiv(T, C)
    chunk = tl.program_id(0) % n_chunks
    bh = (tl.program_id(0) // n_chunks).to(tl.int64)
    h = bh % H
    origin = (bh // H) * T
    start = chunk * C
    first = origin + start
    i, j = tl.arange(0, C), tl.arange(0, C)
    inside = start + i < T
    found = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    for block in range(0, K, BK):
        n = block + tl.arange(0, BK)
        q_tile = load_rows(q, first, q_row, h * K, i, n, inside, K)
        k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K)
        g_tile = load_decays(g, first, g_row, h * K, i, n, inside, K)
        own += tl.sum(q_tile.to(tl.float32) * k_tile.to(tl.float32), axis=1)
        for level in range(LEVELS):
            x = load_halves(q, k, first, q_row, k_row, h * K, level, i, n, inside, K)  # cached; registers are scarce
            x = (x.to(tl.float32) * decay_over(spans, level, i, j, g_tile, WIDE)).to(x.dtype)
            met = tl.dot(x, tl.trans(x), found, input_precision="ieee")
            found = tl.where(across(level, i, j), met, found)  # below the diagonal, queries of right halves
    if STRICT:
        found = tl.where(i[:, None] > j[None, :], found, 0.0) * scale
    else:
        found = tl.where(i[:, None] > j[None, :], found, tl.where(i[:, None] == j[None, :], own[:, None], 0.0)) * scale
    if seq_idx is not None:
        doc_j = tl.load(seq_idx + first + j, mask=start + j < T, other=-1)
        doc = tl.load(seq_idx + first + i, mask=inside, other=-1)
        found = tl.where(doc[:, None] == doc_j[None, :], found, 0.0)
    at = (bh * n_chunks + chunk) * C * C + i[:, None] * C + j[None, :]
    tl.store(scores + at, found.to(scores.dtype.element_ty))

    reads, writes, survives = inside, inside, 1.0
    if seq_idx is not None:
        doc, before, last = documents(seq_idx, origin, start, i, inside, T)
        reads, writes, survives = reads & (doc == before), writes & (doc == last), tl.where(before == last, 1.0, 0.0)
    for block in range(0, K, BK):  # once more from the cache: fewer registers
        n = block + tl.arange(0, BK)
        q_tile = load_rows(q, first, q_row, h * K, i, n, inside, K).to(tl.float32)
        g_tile = load_decays(g, first, g_row, h * K, i, n, inside, K)
        q_tile = tl.where(reads[:, None], q_tile * decay_over(spans, SINCE, i, j, g_tile, WIDE) * scale, 0.0)
        store_rows(q_since, q_tile, first, H * K, h * K, i, n, inside, K)
        if k_until is not None:
            k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K).to(tl.float32)
            k_tile = tl.where(writes[:, None], k_tile * decay_over(spans, UNTIL, i, j, g_tile, WIDE), 0.0)
            store_rows(k_until, k_tile, first, H * K, h * K, i, n, inside, K)
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
    in_square = (n < K)[:, None] & (m < V)[None, :]
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
            key_at + (i[None, :] * (H * K) + n[:, None]), mask=inside[None, :] & (n < K)[:, None], other=0.0
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
            states + (bh * n_chunks + chunk) * K * V + square, mask=(n < K)[:, None] & (m < V)[None, :], other=0.0
        )
        found = tl.dot(keys_tile, state, found, input_precision="ieee")
    store_rows(out, found, first, H * V, h * V, i, m, inside, V)


@triton.jit
def pair_gradients(
    q, k, v, g_tile, seq_idx, spans, do, scale, first, start, T, h, q_row, k_row, v_row, do_row, i, j, n, inside,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients [C, BK] of q and k from the pairs of different tokens, and [C, 1] of each token's score of itself."""
    d_scores = tl.zeros([C, C], tl.float32)  # of i to j
    d_scores_t = tl.zeros([C, C], tl.float32)  # of j to i, by a product of its own: wgmma results do not transpose well
    for block in range(0, V, BV):
        m = block + tl.arange(0, BV)
        do_tile = load_rows(do, first, do_row, h * V, i, m, inside, V)
        v_tile = load_rows(v, first, v_row, h * V, i, m, inside, V)
        d_scores = tl.dot(do_tile, tl.trans(v_tile), d_scores, input_precision="ieee")
        d_scores_t = tl.dot(v_tile, tl.trans(do_tile), d_scores_t, input_precision="ieee")
    d_own = tl.sum(tl.where(i[:, None] == j[None, :], d_scores, 0.0), axis=1)[:, None] * scale
    both = tl.where(i[:, None] > j[None, :], d_scores, d_scores_t) * scale  # what a later token reads, an earlier is
    if seq_idx is not None:
        doc = tl.load(seq_idx + first + i, mask=inside, other=-1)
        doc_j = tl.load(seq_idx + first + j, mask=start + j < T, other=-1)
        both = tl.where(doc[:, None] == doc_j[None, :], both, 0.0)
    both = both.to(q.dtype.element_ty)

    dq_pairs = tl.zeros([C, BK], tl.float32)
    dk_pairs = tl.zeros([C, BK], tl.float32)
    for level in range(LEVELS):
        right = ((i >> level) & 1)[:, None] == 1
        decay = decay_over(spans, level, i, j, g_tile, WIDE)
        x = load_halves(q, k, first, q_row, k_row, h * K, level, i, n, inside, K)
        x = (x.to(tl.float32) * decay).to(x.dtype)
        d_x = tl.dot(tl.where(across(level, i, j), both, 0.0), x, input_precision="ieee")
        dq_pairs += d_x * tl.where(right, decay, 0.0)
        dk_pairs += d_x * tl.where(right, 0.0, decay)
    return dq_pairs, dk_pairs, d_own


@triton.jit
def state_gradient(
    do, states, g_tile, seq_idx, spans, scale, origin, start, T, h, do_row, i, j, n, inside,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient [C, BK] of q from the state that the chunk found, at `states`."""
    first = origin + start
    dq_state = tl.zeros([C, BK], tl.float32)
    for block in range(0, V, BV):
        m = block + tl.arange(0, BV)
        do_tile = load_rows(do, first, do_row, h * V, i, m, inside, V)
        square = n[None, :] * V + m[:, None]  # [BV, BK], transposed
        state = tl.load(states + square, mask=(n < K)[None, :] & (m < V)[:, None], other=0.0)
        dq_state = tl.dot(do_tile, state, dq_state, input_precision="ieee")
    reads = inside
    if seq_idx is not None:
        doc, before, _ = documents(seq_idx, origin, start, i, inside, T)
        reads = reads & (doc == before)
    return tl.where(reads[:, None], dq_state * decay_over(spans, SINCE, i, j, g_tile, WIDE) * scale, 0.0)


@kernel("gla", configs=gradient_configs)
@triton.jit
def gla_gradients(
    q, k, v, g, seq_idx, spans, do, states, state_grads, dq, dk, dg, scale, T, H, q_row, k_row, v_row, g_row, do_row,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and g in a chunk, from the states that it found and the gradient of the state that it left."""
    WIDE: tl.constexpr = q.dtype.element_ty == tl.float32
    n_chunks = tl.cdiv(T, C)
    n_tiles: tl.constexpr = (K + BK - 1) // BK
    tile = tl.program_id(0) % n_tiles
    chunk = (tl.program_id(0) // n_tiles) % n_chunks
    bh = (tl.program_id(0) // (n_tiles * n_chunks)).to(tl.int64)
    h = bh % H
    origin = (bh // H) * T
    start = chunk * C
    first = origin + start
    i, j, n = tl.arange(0, C), tl.arange(0, C), tile * BK + tl.arange(0, BK)
    inside = start + i < T
    g_tile = load_decays(g, first, g_row, h * K, i, n, inside, K)
    dq_pairs, dk_pairs, d_own = pair_gradients(
        q, k, v, g_tile, seq_idx, spans, do, scale, first, start, T, h, q_row, k_row, v_row, do_row, i, j, n, inside,
        K, V, BK, BV, WIDE,
    )  # fmt: skip
    base = (bh * n_chunks + chunk) * K * V
    dq_state = state_gradient(
        do,
        states + base,
        g_tile,
        seq_idx,
        spans,
        scale,
        origin,
        start,
        T,
        h,
        do_row,
        i,
        j,
        n,
        inside,
        K,
        V,
        BK,
        BV,
        WIDE,
    )
    dq_all = dq_pairs + dq_state
    k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K).to(tl.float32)  # and again below: registers are scarce
    store_rows(dq, dq_all + d_own * k_tile, first, H * K, h * K, i, n, inside, K)

    # A decay acts on whatever passes it: what token i reads began before it, what token j writes ends behind it. The
    # pair of a token with itself passes none and is left out, so that nothing large has to cancel.
    q_tile = load_rows(q, first, q_row, h * K, i, n, inside, K).to(tl.float32)
    k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K).to(tl.float32)
    onwards = tl.load(spans + SINCE * C * C + j[None, :] * C + i[:, None])  # itself and later tokens
    if seq_idx is not None:
        doc_i = tl.load(seq_idx + first + i, mask=inside, other=-1)
        doc_j = tl.load(seq_idx + first + j, mask=start + j < T, other=-1)
        onwards = tl.where(doc_i[:, None] == doc_j[None, :], onwards, 0.0)
    d_decay = sums(onwards, q_tile * dq_all - k_tile * dk_pairs, WIDE)

    dk_state = tl.zeros([C, BK], tl.float32)
    kept = tl.zeros([BK], tl.float32)
    for block in range(0, V, BV):
        m = block + tl.arange(0, BV)
        v_tile = load_rows(v, first, v_row, h * V, i, m, inside, V)
        square = n[None, :] * V + m[:, None]
        in_square = (n < K)[None, :] & (m < V)[:, None]
        state = tl.load(states + base + square, mask=in_square, other=0.0)
        d_state = tl.load(state_grads + base + square, mask=in_square, other=0.0)
        dk_state = tl.dot(v_tile, d_state, dk_state, input_precision="ieee")
        kept += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=0)
    g_tile = load_decays(g, first, g_row, h * K, i, n, inside, K)
    whole = tl.exp2(tl.sum(g_tile.to(tl.float32), axis=0) * LOG2E)
    writes, survives, begins = inside, 1.0, i < 0
    if seq_idx is not None:
        doc, before, last = documents(seq_idx, origin, start, i, inside, T)
        writes, survives = writes & (doc == last), tl.where(before == last, 1.0, 0.0)
        begins = start + i > 0
        begins = begins & (doc != tl.load(seq_idx + first + i - 1, mask=inside & begins, other=-1))
    dk_state = tl.where(writes[:, None], dk_state * decay_over(spans, UNTIL, i, j, g_tile, WIDE), 0.0)
    q_tile = load_rows(q, first, q_row, h * K, i, n, inside, K).to(tl.float32)
    store_rows(dk, dk_pairs + dk_state + d_own * q_tile, first, H * K, h * K, i, n, inside, K)
    k_tile = load_rows(k, first, k_row, h * K, i, n, inside, K).to(tl.float32)
    earlier = tl.load(spans + UNTIL * C * C + j[None, :] * C + i[:, None])
    d_decay += sums(earlier, k_tile * dk_state, WIDE)
    d_decay = tl.where(begins[:, None], 0.0, d_decay + (kept * whole * survives)[None, :])
    store_rows(dg, d_decay, first, H * K, h * K, i, n, inside, K)


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
