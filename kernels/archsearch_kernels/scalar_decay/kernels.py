"""Device code of linear attention with one decay per head (chunkwise form, 2312.06635 and 2405.21060).

`scalar_decay_states` walks the chunks and keeps the state that each one finds; walked backwards, with queries and
output gradients in place of keys and values, it keeps the state gradient that each one receives. The others then work
on all chunks at once. Log decays are in base 2 and cumulated within a chunk; only differences that cannot be positive
are raised. A log decay below -40 counts as -40: 4e-18 is below any rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from archsearch_kernels.launch import Arguments, Config, grid, kernel

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-40.0)
DEFAULT_CACHE = tl.constexpr("")


@triton.jit
def _cumulated(g, batch, head, start, T, H, FIXED: tl.constexpr, C: tl.constexpr):
    """Log2 decay from before the chunk to each of its tokens, flat behind the last token."""
    rows = tl.arange(0, C)
    if FIXED:
        one = tl.maximum(tl.load(g + head).to(tl.float32), LEAST) * LOG2_E
        return one * tl.minimum(rows + 1, T - start).to(tl.float32)
    each = tl.load(g + (batch * T + start) * H + head + rows * H, mask=rows < T - start, other=0.0).to(tl.float32)
    return tl.cumsum(tl.maximum(each, LEAST) * LOG2_E, axis=0)


@triton.jit
def _total(g, batch, head, start, T, H, FIXED: tl.constexpr, C: tl.constexpr):
    """Log2 decay of the whole chunk."""
    rows = tl.arange(0, C)
    if FIXED:
        one = tl.maximum(tl.load(g + head).to(tl.float32), LEAST) * LOG2_E
        return one * tl.minimum(T - start, C).to(tl.float32)
    each = tl.load(g + (batch * T + start) * H + head + rows * H, mask=rows < T - start, other=0.0).to(tl.float32)
    return tl.sum(tl.maximum(each, LEAST) * LOG2_E, axis=0)


def _of(arguments: Arguments, *configs: Config) -> Sequence[Config]:
    """The configurations whose tiles are not wider than the heads, tiles cut to them; repetitions left out."""
    widths = {"BK": arguments["KP"], "BV": arguments["VP"]}
    cut = [{n: min(x, widths.get(n, x)) for n, x in c.items()} for c in configs]
    return [c for i, c in enumerate(cut) if c not in cut[:i]]


def _states_configs(arguments: Arguments) -> Sequence[Config]:
    if arguments["k"].element_size() == 4:
        return _of(arguments, *grid(BK=(64,), BV=(32,), num_warps=(4,), num_stages=(2, 3)))
    return _of(
        arguments,
        {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 3},
        *grid(BK=(64, 128), BV=(32, 64), num_warps=(4,), num_stages=(2, 3, 4)),
        *grid(BK=(128,), BV=(64, 128), num_warps=(8,), num_stages=(2, 3)),
    )


@kernel("scalar_decay", configs=_states_configs)
@triton.jit
def scalar_decay_states(
    k,  # [B, T, G, K]; queries if REVERSE
    v,  # [B, T, H, V]; output gradients if REVERSE
    g,
    seq,
    first,  # [B, H, K, V]; what the walk begins with
    states,  # [B, chunks, H, K, V]; what each chunk finds
    last,  # [B, H, K, V]; what the walk ends with
    T,
    H,
    scale,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    FIXED: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    tiles: tl.constexpr = tiles_v * ((K + BK - 1) // BK)
    pid = tl.program_id(0)
    sequence = (pid // tiles).to(tl.int64)
    batch = sequence // H
    head = sequence % H
    rows = tl.arange(0, C)
    of_k = pid % tiles // tiles_v * BK + tl.arange(0, BK)
    of_v = pid % tiles % tiles_v * BV + tl.arange(0, BV)
    in_k = of_k < K
    in_v = of_v < V
    tile = of_k[:, None] * V + of_v[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    k += batch * k_b + head // R * k_h + of_k[:, None]
    v += batch * v_b + head * v_h + of_v[None, :]
    chunks = (T + C - 1) // C

    state = tl.zeros([BK, BV], tl.float32)
    if first is not None:
        state += tl.load(first + sequence * (K * V) + tile, mask=in_tile, other=0.0).to(tl.float32)
    for step in range(chunks):
        chunk = step
        if REVERSE:
            chunk = chunks - 1 - step
        start = tl.cast(chunk, tl.int64) * C
        here = ((batch * chunks + chunk) * H + head) * (K * V)
        tl.store(states + here + tile, state.to(states.dtype.element_ty), mask=in_tile)
        inside = rows < T - start
        kt = tl.load(k + start * k_t + rows[None, :] * k_t, mask=in_k[:, None] & inside[None, :], other=0.0)  # [BK, C]
        vs = tl.load(v + start * v_t + rows[:, None] * v_t, mask=inside[:, None] & in_v[None, :], other=0.0)  # [C, BV]
        decay = _cumulated(g, batch, head, start, T, H, FIXED, C)
        total = _total(g, batch, head, start, T, H, FIXED, C)
        if REVERSE:
            weight = tl.exp2(decay) * scale  # from before the chunk to the token
        else:
            weight = tl.exp2(tl.minimum(total - decay, 0.0))  # from the token to the chunk's end
        kept = tl.exp2(total)
        if seq is not None:
            documents = seq + batch * T
            before = tl.load(documents + tl.maximum(start - 1, 0))
            end = tl.load(documents + tl.minimum(start + C, T) - 1)
            own = tl.load(documents + start + rows, mask=inside, other=-1)
            weight = tl.where(own == (before if REVERSE else end), weight, 0.0)
            kept = tl.where(before == end, kept, 0.0)
        weighted = (vs.to(tl.float32) * weight[:, None]).to(vs.dtype)
        state = tl.dot(kt, weighted, state * kept, input_precision=PRECISION)
    if last is not None:
        tl.store(last + sequence * (K * V) + tile, state, mask=in_tile)


def _outputs_configs(arguments: Arguments) -> Sequence[Config]:
    if arguments["k"].element_size() == 4:
        return _of(arguments, *grid(BK=(32, 16), BV=(64, 32), num_warps=(4,), num_stages=(1, 2)))
    return _of(
        arguments,
        {"BK": 64, "BV": 128, "num_warps": 4, "num_stages": 2},
        *grid(BK=(64, 128), BV=(64, 128), num_warps=(4,), num_stages=(1, 2, 3)),
        *grid(BK=(64, 128), BV=(128,), num_warps=(8,), num_stages=(1, 2)),
    )


@kernel("scalar_decay", configs=_outputs_configs)
@triton.jit
def scalar_decay_outputs(
    q,
    k,
    v,
    g,
    seq,
    states,
    o,  # [B, T, H, V]
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
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    chunks = (T + C - 1) // C
    pid = tl.program_id(0)
    at = (pid // tiles_v).to(tl.int64)  # chunk of a head, heads innermost: those of a group read the same keys
    head = at % H
    batch = at // H // chunks
    start = at // H % chunks * C
    rows = tl.arange(0, C)
    inside = rows < T - start
    of_v = pid % tiles_v * BV + tl.arange(0, BV)
    in_v = of_v < V
    q += batch * q_b + start * q_t + head // R * q_h + rows[:, None] * q_t
    k += batch * k_b + start * k_t + head // R * k_h + rows[None, :] * k_t
    v += batch * v_b + start * v_t + head * v_h + rows[:, None] * v_t
    states += at * (K * V)

    scores = tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, BV], tl.float32)
    for begin in range(0, K, BK):
        of_k = begin + tl.arange(0, BK)
        in_k = of_k < K
        qs = tl.load(q + of_k[None, :], mask=inside[:, None] & in_k[None, :], other=0.0)  # [C, BK]
        kt = tl.load(k + of_k[:, None], mask=in_k[:, None] & inside[None, :], other=0.0)  # [BK, C]
        found = tl.load(
            states + of_k[:, None] * V + of_v[None, :], mask=in_k[:, None] & in_v[None, :], other=0.0
        )  # [BK, BV]
        scores = tl.dot(qs, kt, scores, input_precision=PRECISION)
        out = tl.dot(qs, found, out, input_precision=PRECISION)
    vs = tl.load(v + of_v[None, :], mask=inside[:, None] & in_v[None, :], other=0.0)  # [C, BV]
    decay = _cumulated(g, batch, head, start, T, H, FIXED, C)
    since = tl.exp2(decay)
    keep = rows[:, None] >= rows[None, :]
    if seq is not None:
        documents = seq + batch * T
        before = tl.load(documents + tl.maximum(start - 1, 0))
        own = tl.load(documents + start + rows, mask=inside, other=-1)
        since = tl.where(own == before, since, 0.0)
        keep = keep & (own[:, None] == own[None, :])
    within = tl.where(keep, tl.exp2(tl.minimum(decay[:, None] - decay[None, :], 0.0)) * scale, 0.0)
    out = tl.dot((scores * within).to(vs.dtype), vs, out * (since * scale)[:, None], input_precision=PRECISION)
    to = ((batch * T + start) * H + head) * V + rows[:, None] * (H * V) + of_v[None, :]
    tl.store(o + to, out.to(o.dtype.element_ty), mask=inside[:, None] & in_v[None, :])


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


@kernel("scalar_decay", configs=grid(BV=(32, 16, 64), num_warps=(4, 2, 8), num_stages=(1,)))
@triton.jit
def scalar_decay_token(
    q,  # [B, G, K]
    k,
    v,  # [B, H, V]
    g,  # [B, H] or [H]
    state,  # [B, H, K, V]
    new,  # may be `state`
    o,  # [B, H, V]
    H,
    scale,
    q_b,
    q_h,
    k_b,
    k_h,
    v_b,
    v_h,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    FIXED: tl.constexpr,
    BV: tl.constexpr,
):
    tiles: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    sequence = (pid // tiles).to(tl.int64)
    batch = sequence // H
    head = sequence % H
    of_k = tl.arange(0, KP)
    of_v = pid % tiles * BV + tl.arange(0, BV)
    in_k = of_k < K
    in_v = of_v < V
    at = sequence * (K * V) + of_k[:, None] * V + of_v[None, :]
    before = tl.load(state + at, mask=in_k[:, None] & in_v[None, :], other=0.0).to(tl.float32)
    qs = tl.load(q + batch * q_b + head // R * q_h + of_k, mask=in_k, other=0.0).to(tl.float32) * scale
    ks = tl.load(k + batch * k_b + head // R * k_h + of_k, mask=in_k, other=0.0).to(tl.float32)
    vs = tl.load(v + batch * v_b + head * v_h + of_v, mask=in_v, other=0.0).to(tl.float32)
    decay = tl.exp2(tl.load(g + (head if FIXED else sequence)).to(tl.float32) * LOG2_E)
    after = before * decay + ks[:, None] * vs[None, :]
    tl.store(new + at, after.to(new.dtype.element_ty), mask=in_k[:, None] & in_v[None, :])
    tl.store(o + sequence * V + of_v, tl.sum(after * qs[:, None], axis=0).to(o.dtype.element_ty), mask=in_v)
