"""Attention block by block, then put together: `block_forward` writes a part for each pair, `block_merge` adds up.

A part is the softmax over one block, normalised, with the logarithm of its sum (its peak). A query's parts lie side by
side; their weights follow from the peaks.
"""

import triton
import triton.language as tl

from archsearch_kernels.block_sparse_attention.kernels.blocks import OP, keys_of, parts_of
from archsearch_kernels.block_sparse_attention.kernels.readers import CHUNK as CHUNK  # counts in `code_hash`
from archsearch_kernels.block_sparse_attention.kernels.readers import (
    TOKEN,
    entries,
    heads_padded,
    near_readers,
    opens_of,
    rows_of,
    run_of,
)
from archsearch_kernels.launch import kernel


def tile_configs(arguments):
    """Rows a tile, keys a tile, and programs that share a block's readers.

    A reader of a group brings R rows, so the runs are longer, and more programs to a block end more nearly together.
    """
    width = max(arguments["BD"], arguments["BV"])
    c, heads = arguments["C"], arguments["R"]
    if arguments["q"].element_size() == 4:  # tf32x3: no operand of wgmma may be a register operand, so few rows
        shapes = [(16, 16, 1, 8, 1), (16, 16, 1, 4, 1)]
    elif width > 128:
        shapes = [(64, 32, 1, 8, 2), (64, 32, 2, 8, 2)]
    elif c >= 128:
        shapes = [(128, 64, 1, 8, 2), (128, 64, 2, 8, 2)]
    else:
        shapes = [(64, 64, 2, 4, 3), (64, 64, 4, 4, 3)][:: 1 if heads == 1 else -1]
        shapes += [
            (64, 64, 2, 4, 2), (64, 64, 4, 4, 2), (64, 64, 2, 4, 4), (64, 64, 1, 4, 3), (128, 64, 2, 8, 3),
            (128, 64, 4, 8, 2),
        ]  # fmt: skip
    names = ("BM", "BN", "PARTS", "num_warps", "num_stages")
    shapes = [(max(m, heads_padded(heads)), min(n, c), *rest) for m, n, *rest in shapes]
    return [dict(zip(names, values, strict=True)) for values in shapes]


@kernel(OP, configs=tile_configs)
@triton.jit
def block_forward(
    q, k, v, pairs, ends, tokens, windows, parts, peaks, B0, T, S, NB, LISTS, SELECTORS, PER_KEYS, G, K, scale,
    k_b, k_t, k_h, v_b, v_t, v_h,
    C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """parts [pairs, R, V]: softmax over one block, normalised; peaks [pairs, R] fp32: log2 of its sum."""
    n = tl.program_id(0) // PARTS
    share = tl.program_id(0) % PARTS
    in_slice = tl.program_id(1) // G
    head = tl.program_id(1) % G
    b = (B0 + in_slice).to(tl.int64)
    g = head.to(tl.int64)
    start, end = run_of(ends, (b * G + g) * NB + n, LISTS)
    d = tl.arange(0, BD)
    e = tl.arange(0, BV)
    j = tl.arange(0, BN)
    k_at = k + b * k_b + g * k_h + j[:, None].to(tl.int64) * k_t + d[None, :]
    v_at = v + b * v_b + g * v_h + j[:, None].to(tl.int64) * v_t + e[None, :]
    E: tl.constexpr = BM // R
    q += tl.cast(B0, tl.int64) * T * SELECTORS * R * D  # rows of the slice
    begin, stop = keys_of(windows, b, n, NB, S, C)
    near = near_readers(ends, (b * G + g) * NB + n, windows, n, stop, start, T, S, LISTS, PER_KEYS, C, CHUNK)
    if C == BN:
        key = begin + j
        k_tile = tl.load(k_at + begin.to(tl.int64) * k_t, mask=(key < stop)[:, None] & (d < D)[None, :], other=0.0)
        v_tile = tl.load(v_at + begin.to(tl.int64) * v_t, mask=(key < stop)[:, None] & (e < V)[None, :], other=0.0)
    entry = entries(pairs, start + share * E, end, R, BM)
    for tile in range(share, tl.cdiv(end - start, E), PARTS):
        real, t, row, part = rows_of(entry, in_slice, head, T, SELECTORS, PER_KEYS, K, R, BM)
        entry = entries(pairs, start + (tile + PARTS) * E, end, R, BM)  # the next tile's, in time
        q_at = q + row.to(tl.int64)[:, None] * D + d[None, :]
        x = tl.load(q_at, mask=real[:, None] if D == BD else real[:, None] & (d < D)[None, :], other=0.0)
        if C == BN:
            logits = tl.dot(x, tl.trans(k_tile), input_precision=PRECISION) * (scale * 1.4426950408889634)
            if tile * E < near:
                token = entries(pairs, start + tile * E, end, R, BM) >> TOKEN
                token = tl.where(token < 0, T, token)  # rows that are not there see zeros
                logits = tl.where(key[None, :] <= (token + S - T)[:, None], logits, float("-inf"))
                if tokens is not None:
                    logits = tl.where(key[None, :] >= opens_of(tokens, b, token, T)[:, None], logits, float("-inf"))
            peak = tl.max(logits, 1)
            p = tl.exp2(logits - peak[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        else:
            t = tl.where(real, t, T)
            if tokens is not None:
                opens = opens_of(tokens, b, t, T)
            peak = tl.full([BM], -1.0e30, dtype=tl.float32)
            total = tl.zeros([BM], dtype=tl.float32)
            out = tl.zeros([BM, BV], dtype=tl.float32)
            for first in range(0, C, BN):
                key = begin + first + j
                here = begin.to(tl.int64) + first
                k_tile = tl.load(k_at + here * k_t, mask=(key < stop)[:, None] & (d < D)[None, :], other=0.0)
                v_tile = tl.load(v_at + here * v_t, mask=(key < stop)[:, None] & (e < V)[None, :], other=0.0)
                logits = tl.dot(x, tl.trans(k_tile), input_precision=PRECISION) * (scale * 1.4426950408889634)
                logits = tl.where(key[None, :] <= (t + S - T)[:, None], logits, float("-inf"))
                if tokens is not None:
                    logits = tl.where(key[None, :] >= opens[:, None], logits, float("-inf"))
                higher = tl.maximum(peak, tl.max(logits, 1))
                shrink = tl.exp2(peak - higher)
                p = tl.exp2(logits - higher[:, None])
                total = total * shrink + tl.sum(p, 1)
                out = tl.dot(p.to(v_tile.dtype), v_tile, out * shrink[:, None], input_precision=PRECISION)
                peak = higher
        out_at = parts + part.to(tl.int64)[:, None] * V + e[None, :]
        out = out * (1.0 / total)[:, None]
        tl.store(
            out_at, out.to(parts.dtype.element_ty), mask=real[:, None] if V == BV else real[:, None] & (e < V)[None, :]
        )
        tl.store(peaks + part, peak + tl.log2(total), mask=real)


MERGES = [
    {"BM": m, "num_warps": w} for m, w in ((16, 4), (8, 4), (32, 4), (32, 8), (8, 2), (16, 8))
]  # rows of one or two tokens: their parts lie side by side


@kernel(OP, configs=MERGES)
@triton.jit
def block_merge(
    parts, peaks, tokens, out, log_sums, B0, ROWS, T, S, H, K,
    C: tl.constexpr, R: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, V] and log_sums [B, T, H] (base 2) from the blocks' parts. Row: (b T + t) H + h."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)  # there are fewer than 2^31 parts
    real = row < ROWS
    t = (row // H) % T
    n_parts = parts_of(t, B0 + row // H // T, real, tokens, T, S, K, C)
    e = tl.arange(0, BV)
    j = tl.arange(0, KP)
    at = (row // R) * K * R + row % R  # of the first part
    some = real[:, None] & (j[None, :] < n_parts[:, None])
    peak = tl.load(peaks + at[:, None] + j[None, :] * R, mask=some, other=float("-inf"))
    top = tl.where(real, tl.max(peak, 1), 0.0)
    log_sum = top + tl.log2(tl.where(real, tl.sum(tl.exp2(peak - top[:, None]), 1), 1.0))
    total = tl.zeros([BM, BV], dtype=tl.float32)
    for i in range(K):
        here = real & (i < n_parts)
        weight = tl.exp2(tl.load(peaks + at + i * R, mask=here, other=float("-inf")) - log_sum)
        part = tl.load(
            parts + (at + i * R).to(tl.int64)[:, None] * V + e[None, :],
            mask=here[:, None] & (e < V)[None, :],
            other=0.0,
        )
        total += weight[:, None] * part.to(tl.float32)
    to = tl.cast(B0, tl.int64) * T * H + row
    tl.store(out + to[:, None] * V + e[None, :], total.to(out.dtype.element_ty), mask=real[:, None] & (e < V)[None, :])
    tl.store(log_sums + to, log_sum, mask=real)
