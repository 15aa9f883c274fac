"""Gradients: `attention_dq` of the queries, and delta, which `attention_dkdv`, of keys and values, and
`attention_dsink` read. Probabilities are made anew from the rows' log-sum-exp."""

import triton
import triton.language as tl

from archsearch_kernels.attention.kernels.tiles import LOG2E, _store, _tile, is_wide, tiles, width
from archsearch_kernels.attention.kernels.visible import _keys_of, _place, _rows_of
from archsearch_kernels.launch import kernel


def dq_configs(a):
    if is_wide(a) and width(a) > 64:
        return tiles((16, 32, 8, 1), (32, 16, 8, 1), (64, 16, 8, 1))
    if is_wide(a):
        return tiles((64, 32, 8, 1), (32, 16, 4, 1), (32, 32, 4, 1))
    if width(a) <= 64:
        return tiles((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3))
    if width(a) <= 128:
        return tiles((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3))
    return tiles((128, 32, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1), (64, 32, 8, 2))


@triton.jit
def _dq_tiles(
    dq, q, do, lse2, delta, k, v, k_stride, v_stride, row, row_doc, docs, first, whole, broken, last, S, window, scale2,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_DOCS: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    for n in range(first, last, BN):
        n64 = tl.cast(n, tl.int64)
        keys = _tile(k + n64 * k_stride, k_stride, S - n, BN, D, BD, True)  # [BN, D]
        s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)  # [BM, BN]
        values = _tile(v + n64 * v_stride, v_stride, S - n, BN, V, BV, True)  # [BN, V]
        dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        p = tl.exp2(s * scale2 - lse2[:, None])
        if (n < whole) | (n >= broken):
            key = n + tl.arange(0, BN)
            seen = key[None, :] <= row[:, None]
            if HAS_WINDOW:
                seen = seen & (key[None, :] > row[:, None] - window)
            if HAS_DOCS:
                doc = tl.load(docs + key, mask=key < S, other=-1)
                seen = seen & (doc[None, :] == row_doc[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@kernel("attention", configs=dq_configs)
@triton.jit(do_not_specialize=["n_heads", "section", "window"])
def attention_dq(
    q, k, v, docs, o, lse, do, dlse, delta, dq, T, S, H, n_heads, section, window, scale, scale2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, docs_b,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of BM queries; on the way delta [B, H, T], the rows' sum of o do, which the other kernel needs too."""
    n_tiles = (T + BM - 1) // BM
    tile, bh = _place(tl.program_id(0), n_tiles, n_heads, section)
    m0 = (n_tiles - 1 - tile) * BM
    h = bh % H
    b64 = (bh // H).to(tl.int64)
    h64 = h.to(tl.int64)
    g64 = (h // GROUP).to(tl.int64)
    m64 = m0.to(tl.int64)
    k += b64 * k_b + g64 * k_h
    v += b64 * v_b + g64 * v_h
    at = m0 + tl.arange(0, BM)
    row = at + (S - T)
    row_doc = row
    if HAS_DOCS:
        docs += b64 * docs_b
        row_doc = tl.load(docs + at, mask=at < T, other=-2)
    first, whole, broken, last = _keys_of(m0, T, S, window, docs, HAS_WINDOW, HAS_DOCS, BM, BN)
    douts = _tile(do + b64 * do_b + h64 * do_h + m64 * do_t, do_t, T - m0, BM, V, BV, True)
    outs = _tile(o + ((b64 * T + m64) * H + h64) * V, H * V, T - m0, BM, V, BV, True)
    rows = (b64 * H + h64) * T
    sums = tl.sum(outs.to(tl.float32) * douts.to(tl.float32), 1)
    if HAS_DLSE:
        sums -= tl.load(dlse + rows + at, mask=at < T, other=0.0)
    tl.store(delta + rows + at, sums, mask=at < T)
    queries = _tile(q + b64 * q_b + h64 * q_h + m64 * q_t, q_t, T - m0, BM, D, BD, True)
    lse2 = tl.load(lse + rows + at, mask=at < T, other=float("inf")) * LOG2E
    acc = tl.zeros((BM, BD), dtype=tl.float32)
    acc = _dq_tiles(
        acc, queries, douts, lse2, sums, k, v, k_t, v_t, row, row_doc, docs, first, whole, broken, last, S, window,
        scale2, D, V, BD, BV, HAS_WINDOW, HAS_DOCS, PRECISION, BN,
    )  # fmt: skip
    _store(dq + ((b64 * T + m64) * H + h64) * D, H * D, T - m0, acc * scale, BM, D, BD)


def dkdv_configs(a):
    if is_wide(a) and width(a) > 64:
        return tiles((32, 16, 8, 1), (16, 16, 4, 1), (16, 32, 8, 1))
    if is_wide(a):
        return tiles((16, 32, 4, 1), (32, 32, 4, 1), (32, 64, 8, 1))
    if width(a) <= 64:
        return tiles((64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2))
    if width(a) <= 128:
        return tiles((64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2), (32, 64, 4, 2), (64, 128, 8, 3))
    return tiles((32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1))


@triton.jit
def _rows_at(base, row, stride, end, D: tl.constexpr, BD: tl.constexpr):
    """Rows of D numbers, 0 from `end` on. Every address is made anew: kept through a loop, they cost registers."""
    d = tl.arange(0, BD)
    at = base + row.to(tl.int64)[:, None] * stride + d[None, :]
    if D == BD:
        x = tl.load(at, mask=row[:, None] < end, other=0.0)
    else:
        x = tl.load(at, mask=(row[:, None] < end) & (d[None, :] < D), other=0.0)
    return x


@triton.jit
def _dkdv_tiles(
    dk, dv, keys, values, q, do, lse, delta, q_stride, do_stride, key, key_doc, docs, first, whole, broken, last,
    T, offset, window, scale2,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_DOCS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Scores are made transposed, keys by rows, so that no accumulator has to be turned round."""
    for m in range(first, last, BM):
        at = m + tl.arange(0, BM)
        queries = _rows_at(q, at, q_stride, T, D, BD)  # [BM, D]
        s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # [BN, BM]
        if (m < whole) | (m >= broken):
            row = at + offset
            seen = key[:, None] <= row[None, :]
            if HAS_WINDOW:
                seen = seen & (key[:, None] > row[None, :] - window)
            if HAS_DOCS:
                doc = tl.load(docs + at, mask=at < T, other=-2)
                seen = seen & (key_doc[:, None] == doc[None, :])
            s = tl.where(seen, s, float("-inf"))
        lse2 = tl.load(lse + at, mask=at < T, other=0.0) * LOG2E  # beyond T, q and do are 0
        p = tl.exp2(s * scale2 - lse2[None, :])
        douts = _rows_at(do, at, do_stride, T, V, BV)  # [BM, V]
        dv = tl.dot(p.to(douts.dtype), douts, dv, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(douts), input_precision=PRECISION)  # [BN, BM]
        sums = tl.load(delta + at, mask=at < T, other=0.0)
        ds = p * (dp - sums[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@kernel("attention", configs=dkdv_configs)
@triton.jit(do_not_specialize=["n_heads", "section", "window"])
def attention_dkdv(
    q, k, v, docs, lse, do, delta, dk, dv, T, S, H, n_heads, section, window, scale, scale2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, docs_b,
    GROUP: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys and values [B, S, G, PARTS, D] and [.., V], each part from GROUP / PARTS query heads."""
    HEADS: tl.constexpr = GROUP // PARTS
    n_tiles = (S + BN - 1) // BN
    tile, bgp = _place(tl.program_id(0), n_tiles, n_heads, section)
    n0 = tile * BN  # the first keys are seen by most
    groups = H // GROUP
    parts = groups * PARTS
    b64 = (bgp // parts).to(tl.int64)
    gp = bgp % parts
    g64 = (gp // PARTS).to(tl.int64)
    n64 = n0.to(tl.int64)
    key = n0 + tl.arange(0, BN)
    key_doc = key
    if HAS_DOCS:
        docs += b64 * docs_b
        key_doc = tl.load(docs + key, mask=key < S, other=-1)
    first, whole, broken, last = _rows_of(n0, T, S, window, docs, HAS_WINDOW, HAS_DOCS, BM, BN)
    keys = _tile(k + b64 * k_b + g64 * k_h + n64 * k_t, k_t, S - n0, BN, D, BD, True)
    values = _tile(v + b64 * v_b + g64 * v_h + n64 * v_t, v_t, S - n0, BN, V, BV, True)
    acc_k = tl.zeros((BN, BD), dtype=tl.float32)
    acc_v = tl.zeros((BN, BV), dtype=tl.float32)
    for j in range(HEADS):
        h64 = tl.cast(gp * HEADS + j, tl.int64)
        q_h64 = q + b64 * q_b + h64 * q_h
        do_h64 = do + b64 * do_b + h64 * do_h
        rows = (b64 * H + h64) * T
        acc_k, acc_v = _dkdv_tiles(
            acc_k, acc_v, keys, values, q_h64, do_h64, lse + rows, delta + rows, q_t, do_t, key, key_doc, docs,
            first, whole, broken, last, T, S - T, window, scale2, D, V, BD, BV, HAS_WINDOW, HAS_DOCS, PRECISION, BM,
        )  # fmt: skip
    out = (b64 * S + n64) * parts + gp
    _store(dk + out * D, parts * D, S - n0, acc_k * scale, BN, D, BD)
    _store(dv + out * V, parts * V, S - n0, acc_v, BN, V, BV)


@kernel("attention", configs=[{"BT": n, "num_warps": w, "num_stages": 1} for n, w in ((1024, 4), (2048, 8), (512, 4))])
@triton.jit
def attention_dsink(sink, lse, delta, dsink, B, T, H, BT: tl.constexpr):
    """The sink's gradient of one head [H]: it takes exp(sink - lse) of every row and gives nothing back."""
    h = tl.program_id(0)
    idle = tl.load(sink + h).to(tl.float32)
    acc = tl.zeros((BT,), dtype=tl.float32)
    for b in range(B):
        rows = (tl.cast(b, tl.int64) * H + h) * T
        for t in range(0, T, BT):
            at = t + tl.arange(0, BT)
            weight = tl.exp2((idle - tl.load(lse + rows + at, mask=at < T, other=float("inf"))) * LOG2E)
            acc -= weight * tl.load(delta + rows + at, mask=at < T, other=0.0)
    tl.store(dsink + h, tl.sum(acc, 0))
