"""Forward: BM rows of one head against all keys that they see."""

import triton
import triton.language as tl

from archsearch_kernels.attention.kernels.tiles import LN2, LOG2E, NOWHERE, _store, _tile, is_wide, tiles, width
from archsearch_kernels.attention.kernels.visible import _keys_of, _place
from archsearch_kernels.launch import kernel


def forward_configs(a):
    """128 rows of queries against 64 or 128 keys; the accumulator of a 256 wide head leaves room for less."""
    if is_wide(a) and width(a) > 64:
        return tiles((32, 16, 8, 1), (16, 32, 8, 1), (64, 16, 8, 2), (16, 16, 4, 1))
    if is_wide(a):
        return tiles((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 4, 2), (64, 16, 4, 2))
    if width(a) <= 64:
        return tiles((128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2))
    if width(a) <= 128:
        rows = [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)]
        return tiles(*rows) if a["HAS_WINDOW"] or a["HAS_DOCS"] else tiles((128, 128, 8, 2), *rows)
    return tiles((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2))


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
