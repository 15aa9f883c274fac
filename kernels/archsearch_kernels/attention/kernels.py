"""Device code of causal softmax attention (FlashAttention-2, 2307.08691): forward, backward, one-token decode.

Rows are queries: row i of T stands at position i + S - T among the S keys. In a loop over tiles only those at the
edge of the window and on the diagonal take the branch with masks: loops of their own would hand the accumulators
over, and ptxas then runs every wgmma alone (C7515). Scores are kept in units of log 2: `scale2` is the softmax's
scale times log2(e), so exp2 needs no further product.
"""

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOWHERE = tl.constexpr(-1e30)  # below every score, and finite: it may be subtracted from -inf


def _tiles(*rows):
    return [dict(zip(("BM", "BN", "num_warps", "num_stages"), row, strict=True)) for row in rows]


def _width(a):
    return max(a["BD"], a["BV"])


def _is_wide(a):
    return a["q"].element_size() == 4


def forward_configs(a):
    """128 rows of queries against 64 or 128 keys; the accumulator of a 256 wide head leaves room for less."""
    if _is_wide(a) and _width(a) > 64:
        return _tiles((32, 16, 8, 1), (16, 32, 8, 1), (64, 16, 8, 2), (16, 16, 4, 1))
    if _is_wide(a):
        return _tiles((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 4, 2), (64, 16, 4, 2))
    if _width(a) <= 64:
        return _tiles((128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2))
    if _width(a) <= 128:
        rows = [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)]
        return _tiles(*rows) if a["HAS_WINDOW"] or a["HAS_DOCS"] else _tiles((128, 128, 8, 2), *rows)
    return _tiles((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2))


def dq_configs(a):
    if _is_wide(a) and _width(a) > 64:
        return _tiles((16, 32, 8, 1), (32, 16, 8, 1), (64, 16, 8, 1))
    if _is_wide(a):
        return _tiles((64, 32, 8, 1), (32, 16, 4, 1), (32, 32, 4, 1))
    if _width(a) <= 64:
        return _tiles((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3))
    if _width(a) <= 128:
        return _tiles((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3))
    return _tiles((128, 32, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1), (64, 32, 8, 2))


def dkdv_configs(a):
    if _is_wide(a) and _width(a) > 64:
        return _tiles((32, 16, 8, 1), (16, 16, 4, 1), (16, 32, 8, 1))
    if _is_wide(a):
        return _tiles((16, 32, 4, 1), (32, 32, 4, 1), (32, 64, 8, 1))
    if _width(a) <= 64:
        return _tiles((64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2))
    if _width(a) <= 128:
        return _tiles((64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2), (32, 64, 4, 2), (64, 128, 8, 3))
    return _tiles((32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1))


def step_configs(a):
    """Of splits one runs on a processor: it alone has to keep enough bytes on their way."""
    if _is_wide(a):
        rows = [(32, 8, 2), (16, 4, 2), (32, 4, 2), (64, 8, 2)]
    elif _width(a) > 128:
        rows = [(32, 4, 4), (32, 4, 3), (64, 8, 3), (64, 4, 2)]
    elif a.get("SPLIT"):
        rows = [(64, 4, 4), (128, 8, 3), (32, 4, 6), (64, 8, 4), (64, 4, 3), (32, 4, 4), (128, 4, 2)]
    else:
        rows = [(64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3), (32, 4, 4)]
    return [{"BN": n, "num_warps": w, "num_stages": s} for n, w, s in rows]


@triton.jit
def _tile(base, stride, left, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CHECKED: tl.constexpr):
    """N rows of D numbers from `base`, of which `left` exist; what does not exist is 0."""
    row = tl.arange(0, N)
    d = tl.arange(0, BD)
    at = base + row[:, None] * stride + d[None, :]
    if CHECKED:
        if D == BD:
            x = tl.load(at, mask=row[:, None] < left, other=0.0)
        else:
            x = tl.load(at, mask=(row[:, None] < left) & (d[None, :] < D), other=0.0)
    else:
        if D == BD:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=d[None, :] < D, other=0.0)
    return x


@triton.jit
def _store(base, stride, left, x, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    row = tl.arange(0, N)
    d = tl.arange(0, BD)
    at = base + row[:, None] * stride + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=(row[:, None] < left) & (d[None, :] < D))


@triton.jit
def _place(pid, n_tiles, n_heads, section):
    """(tile, head) of a program: heads in sections whose keys fit the L2 cache, in a section tile by tile."""
    number = pid // (section * n_tiles)
    rest = pid - number * section * n_tiles
    width = tl.minimum(section, n_heads - number * section)
    return rest // width, number * section + rest % width


@triton.jit
def _start_of_document(docs, at):
    """The first token of the document of token `at`, by bisection: a document is a run of equal numbers."""
    doc = tl.load(docs + at)
    low = at * 0
    high = at
    while low < high:
        middle = (low + high) // 2
        same = tl.load(docs + middle) == doc
        low = tl.where(same, low, middle + 1)
        high = tl.where(same, middle, high)
    return low


@triton.jit
def _end_of_document(docs, at, T):
    """One behind the last token of the document of token `at`."""
    doc = tl.load(docs + at)
    low = at + 1
    high = T
    while low < high:
        middle = (low + high) // 2
        same = tl.load(docs + middle) == doc
        low = tl.where(same, middle + 1, low)
        high = tl.where(same, high, middle)
    return low


@triton.jit
def _keys_of(
    m0, T, S, window, docs, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Keys that rows m0 to m0 + BM see: from `first` to `last`, all of them from `whole` to `broken`."""
    offset = S - T
    first = m0 * 0
    whole = m0 * 0
    broken = (m0 + offset + 1) // BN * BN
    last = tl.minimum(S, m0 + BM + offset)
    if HAS_WINDOW:
        first = tl.maximum(m0 + offset - window + 1, 0)
        whole = tl.maximum(m0 + BM + offset - window, 0)
    if HAS_DOCS:
        start = _start_of_document(docs, m0)
        first = tl.maximum(first, start)
        one = tl.load(docs + m0) == tl.load(docs + tl.minimum(m0 + BM, T) - 1)
        whole = tl.where(one, tl.maximum(whole, start), S)
    first = first // BN * BN
    whole = (whole + BN - 1) // BN * BN
    broken = tl.where(broken > whole, broken, first)
    return first, tl.minimum(whole, broken), broken, last


@triton.jit
def _rows_of(
    n0, T, S, window, docs, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Rows that see keys n0 to n0 + BN: from `first` to `last`, all of them from `whole` to `broken`."""
    offset = S - T
    first = tl.maximum(n0 - offset, 0) // BM * BM
    whole = (tl.maximum(n0 + BN - 1 - offset, 0) + BM - 1) // BM * BM
    broken = T
    last = T
    if HAS_WINDOW:
        broken = tl.minimum(broken, n0 + window - offset)
        last = tl.minimum(last, n0 + BN - 1 + window - offset)
    if HAS_DOCS:
        bottom = tl.minimum(n0 + BN, T) - 1
        end = _end_of_document(docs, bottom, T)
        last = tl.minimum(last, end)
        one = tl.load(docs + n0) == tl.load(docs + bottom)
        broken = tl.where(one, tl.minimum(broken, end), 0)
    broken = tl.maximum(broken, 0) // BM * BM
    broken = tl.where(broken > whole, broken, first)
    return first, tl.minimum(whole, broken), broken, last


@triton.jit
def _forward_tiles(
    acc, top, total, q, k, v, k_stride, v_stride, row, row_doc, docs, first, whole, broken, last, S, window, scale2,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_DOCS: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    for n in range(first, last, BN):
        n64 = tl.cast(n, tl.int64)
        keys = _tile(k + n64 * k_stride, k_stride, S - n, BN, D, BD, True)  # [BN, D]
        s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)  # [BM, BN]
        if (n < whole) | (n >= broken):
            key = n + tl.arange(0, BN)
            seen = key[None, :] <= row[:, None]
            if HAS_WINDOW:
                seen = seen & (key[None, :] > row[:, None] - window)
            if HAS_DOCS:
                doc = tl.load(docs + key, mask=key < S, other=-1)
                seen = seen & (doc[None, :] == row_doc[:, None])
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - higher[:, None])
        kept = tl.exp2(top - higher)
        total = total * kept + tl.sum(p, 1)
        acc = acc * kept[:, None]
        values = _tile(v + n64 * v_stride, v_stride, S - n, BN, V, BV, True)  # [BN, V]
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
        top = higher
    return acc, top, total


@kernel("attention", configs=forward_configs)
@triton.jit(do_not_specialize=["n_heads", "section", "window"])
def attention_forward(
    q, k, v, sink, docs, o, lse, T, S, H, n_heads, section, window, scale2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, docs_b,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_SINK: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM rows of one head: o [B, T, H, V] and their log-sum-exp [B, H, T]. Longest rows first."""
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
    queries = _tile(q + b64 * q_b + h64 * q_h + m64 * q_t, q_t, T - m0, BM, D, BD, True)
    acc = tl.zeros((BM, BV), dtype=tl.float32)
    top = tl.full((BM,), NOWHERE, dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    if HAS_SINK:
        idle = tl.load(sink + h).to(tl.float32) * LOG2E
        top = tl.maximum(top, idle)
        total = tl.exp2(idle - top)
    acc, top, total = _forward_tiles(
        acc, top, total, queries, k, v, k_t, v_t, row, row_doc, docs, first, whole, broken, last, S, window, scale2,
        D, V, BD, BV, HAS_WINDOW, HAS_DOCS, PRECISION, BN,
    )  # fmt: skip
    total = tl.where(at < T, total, 1.0)
    total = tl.where(at < T, total, 1.0)
    out = o + ((b64 * T + m64) * H + h64) * V
    _store(out, H * V, T - m0, acc / total[:, None], BM, V, BV)
    tl.store(lse + (b64 * H + h64) * T + at, (top + tl.log2(total)) * LN2, mask=at < T)


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


@triton.jit
def _step_tile(
    acc, top, total, q, k, v, q_stride, k_stride, v_stride, n, end, scale2, GROUP: tl.constexpr, BH: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The queries are loaded again with each tile: loads run ahead only in loops, and the first keys would wait."""
    n64 = tl.cast(n, tl.int64)
    queries = _tile(q + (n64 >> 31), q_stride, GROUP, BH, D, BD, True)  # which is 0, but the compiler must not know
    keys = _tile(k + n64 * k_stride, k_stride, end - n, BN, D, BD, MASKED)  # [BN, D]
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BH, BN]
    if MASKED:
        s = tl.where((n + tl.arange(0, BN) < end)[None, :], s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1) * scale2)
    p = tl.exp2(s * scale2 - higher[:, None])
    kept = tl.exp2(top - higher)
    total = total * kept + tl.sum(p, 1)
    values = _tile(v + n64 * v_stride, v_stride, end - n, BN, V, BV, MASKED)  # [BN, V]
    acc = tl.dot(p.to(values.dtype), values, acc * kept[:, None], input_precision=PRECISION)
    return acc, higher, total


@triton.jit
def _merge(
    part, part_lse, sink, o, lse, heads, first_head, splits,
    GROUP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, GP: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """All splits of a group's heads and the sink, weighed into o [B, H, V] and lse [B, H] in the order of the keys."""
    j = tl.arange(0, GP)
    d = tl.arange(0, BV)
    i = tl.arange(0, BS)
    for j0 in range(0, GROUP, GP):
        real = j0 + j < GROUP
        bh = heads + j0 + j
        top = tl.full((GP,), NOWHERE, dtype=tl.float32)
        total = tl.zeros((GP,), dtype=tl.float32)
        if HAS_SINK:
            idle = tl.load(sink + first_head + j0 + j, mask=real, other=0.0).to(tl.float32) * LOG2E
            top = tl.maximum(top, idle)
            total = tl.exp2(idle - top)
        acc = tl.zeros((GP, BV), dtype=tl.float32)
        for i0 in range(0, splits, BS):
            at = bh[None, :] * splits + (i0 + i)[:, None]  # [BS, GP]
            there = real[None, :] & (i0 + i < splits)[:, None]
            mask = there[:, :, None] & (d < V)[None, None, :]
            x = tl.load(part + at[:, :, None] * V + d[None, None, :], mask=mask, other=0.0)  # [BS, GP, BV]
            sums = tl.load(part_lse + at, mask=there, other=float("-inf"))
            higher = tl.maximum(top, tl.max(sums, 0))
            weight = tl.exp2(sums - higher[None, :])
            kept = tl.exp2(top - higher)
            total = total * kept + tl.sum(weight, 0)
            acc = acc * kept[:, None] + tl.sum(x * weight[:, :, None], 0)
            top = higher
        out = o + bh[:, None] * V + d[None, :]
        acc = acc / tl.where(real, total, 1.0)[:, None]
        tl.store(out, acc.to(o.dtype.element_ty), mask=real[:, None] & (d < V)[None, :])
        tl.store(lse + bh, (top + tl.log2(total)) * LN2, mask=real)


@kernel("attention", configs=step_configs)
@triton.jit(do_not_specialize=["S", "length", "splits"])
def attention_step(
    q, k, v, sink, o, lse, part, part_lse, arrived, S, G, length, splits, scale2,
    q_b, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    GROUP: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    HAS_SINK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, BS: tl.constexpr, GP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One query of all heads of a group over `length` keys: part [B, H, splits, V] and its log2-sum, or o itself.

    arrived [B * G], or None: how many splits are in memory. Who comes last merges them, and leaves a 0.
    """
    split = tl.program_id(0)
    bg = tl.program_id(1)
    b64 = (bg // G).to(tl.int64)
    g = bg % G
    g64 = g.to(tl.int64)
    k += b64 * k_b + g64 * k_h
    v += b64 * v_b + g64 * v_h
    head = tl.arange(0, BH)
    real = head < GROUP
    q += b64 * q_b + g64 * GROUP * q_h
    acc = tl.zeros((BH, BV), dtype=tl.float32)
    top = tl.full((BH,), NOWHERE, dtype=tl.float32)
    total = tl.zeros((BH,), dtype=tl.float32)
    first = split * length
    end = tl.minimum(first + length, S)
    whole = first + (end - first) // BN * BN
    for n in range(first, whole, BN):
        acc, top, total = _step_tile(
            acc, top, total, q, k, v, q_h, k_t, v_t, n, end, scale2, GROUP, BH, D, V, BD, BV, PRECISION, False, BN
        )  # fmt: skip
    if whole < end:
        acc, top, total = _step_tile(
            acc, top, total, q, k, v, q_h, k_t, v_t, whole, end, scale2, GROUP, BH, D, V, BD, BV, PRECISION, True, BN
        )  # fmt: skip
    heads = bg.to(tl.int64) * GROUP  # of all B x H
    if SPLIT:
        _store(part + (heads * splits + split) * V, splits * V, GROUP, acc / total[:, None], BH, V, BV)
        tl.store(part_lse + (heads + head) * splits + split, top + tl.log2(total), mask=real)
        if arrived is not None:
            tl.debug_barrier()  # every thread's stores come before the one thread's release
            if tl.atomic_add(arrived + bg, 1, sem="acq_rel", scope="gpu") == splits - 1:
                _merge(part, part_lse, sink, o, lse, heads, g * GROUP, splits, GROUP, V, BV, BS, GP, HAS_SINK)
                tl.store(arrived + bg, 0)
    else:
        if HAS_SINK:
            idle = tl.load(sink + g * GROUP + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            higher = tl.maximum(top, idle)
            kept = tl.exp2(top - higher)
            total = total * kept + tl.exp2(idle - higher)
            acc = acc * kept[:, None]
            top = higher
        _store(o + heads * V, V, GROUP, acc / total[:, None], BH, V, BV)
        tl.store(lse + heads + head, (top + tl.log2(total)) * LN2, mask=real)


@kernel("attention", configs=[{"num_warps": w, "num_stages": 1} for w in (4, 2, 1, 8)])
@triton.jit(do_not_specialize=["splits"])
def attention_combine(
    part, part_lse, sink, o, lse, splits, H, V: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """The splits of one head weighed into BV columns of o [B, H, V] and lse [B, H], the sink included."""
    bh = tl.program_id(0)
    bh64 = bh.to(tl.int64)
    d = tl.program_id(1) * BV + tl.arange(0, BV)
    i = tl.arange(0, BS)
    sums = tl.load(part_lse + bh64 * splits + i, mask=i < splits, other=float("-inf"))
    top = tl.max(sums, 0)
    idle = top
    if HAS_SINK:
        idle = tl.load(sink + bh % H).to(tl.float32) * LOG2E
        top = tl.maximum(top, idle)
    weight = tl.exp2(sums - top)
    total = tl.sum(weight, 0)
    if HAS_SINK:
        total += tl.exp2(idle - top)
    at = part + bh64 * splits * V + i[:, None] * V + d[None, :]
    x = tl.load(at, mask=(i[:, None] < splits) & (d[None, :] < V), other=0.0)
    out = tl.sum(x * weight[:, None], 0) / total
    tl.store(o + bh64 * V + d, out.to(o.dtype.element_ty), mask=d < V)
    tl.store(lse + bh64, (top + tl.log2(total)) * LN2)
