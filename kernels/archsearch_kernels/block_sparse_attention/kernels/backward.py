"""Gradients, in the order of the launches.

`block_delta` makes what the softmax subtracts from every row; `block_sort_rows` brings it and the forward's sums into
the order of the readers. `block_backward_keys` makes a block's dk and dv from all its readers, and their parts of dq
where registers allow; `block_sum_parts` adds dk and dv where several programs share a block's readers. For larger
blocks `block_backward_queries` makes the parts of dq. `block_merge_gradient` adds them up.
"""

import triton
import triton.language as tl

from archsearch_kernels.block_sparse_attention.kernels.blocks import OP, keys_of, parts_of
from archsearch_kernels.block_sparse_attention.kernels.forward import MERGES, tile_configs
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


@kernel(OP, configs=[{"BM": m, "num_warps": w} for m, w in ((32, 4), (16, 4), (64, 8), (64, 4))])
@triton.jit
def block_delta(grad, out, delta, ROWS, V: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr):
    """delta [B, T, H]: sum of gradient times output."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    e = tl.arange(0, BV)
    mask = (row < ROWS)[:, None] & (e < V)[None, :]
    at = row.to(tl.int64)[:, None] * V + e[None, :]
    x = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(x * y, 1), mask=row < ROWS)


@kernel(OP, configs=[{"BM": m, "num_warps": w} for m, w in ((1024, 4), (512, 4), (2048, 8))])
@triton.jit
def block_sort_rows(
    pairs, ends, log_sums, delta, log_sums_sorted, delta_sorted, T, NB, LISTS, SELECTORS, PER_KEYS, G,
    R: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """log_sums and delta [pairs, R] in the order of `pairs`: `block_backward_keys` then reads them side by side."""
    bg = tl.program_id(1)
    start, end = run_of(ends, bg, LISTS * NB)
    E: tl.constexpr = BM // R
    first = start + tl.program_id(0) * E
    entry = entries(pairs, first, end, R, BM)
    real, _t, row, _part = rows_of(entry, bg // G, bg % G, T, SELECTORS, PER_KEYS, 1, R, BM)
    to = first.to(tl.int64) * R + tl.arange(0, BM)
    tl.store(log_sums_sorted + to, tl.load(log_sums + row, mask=real, other=0.0), mask=real)
    tl.store(delta_sorted + to, tl.load(delta + row, mask=real, other=0.0), mask=real)


def key_configs(arguments):
    """Rows a tile and keys a program; where the gradient of q is made here too, the whole block.

    Four warps hold 64 keys' sums, and two programs share a processor: one multiplies while the other waits or stores.
    Eight warps compute two of the five products twice. Below three stages no load runs beside the products.
    """
    width = max(arguments["BD"], arguments["BV"])
    c, heads, with_dq = arguments["C"], arguments["R"], arguments["WITH_DQ"]
    if arguments["q"].element_size() == 4:
        shapes = [(32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)]
    elif width > 128:
        shapes = [(32, 32, 8, 1), (32, 32, 8, 2), (64, 32, 8, 1)]
    else:
        shapes = [(32, 64, 4, 3), (32, 64, 8, 3), (32, 64, 4, 2)]
    names = ("BM", "BN", "num_warps", "num_stages")
    made = [(max(m, heads_padded(heads)), c if with_dq else min(n, c), *rest) for m, n, *rest in shapes]
    return [dict(zip(names, values, strict=True)) for values in made]


@kernel(OP, configs=key_configs)
@triton.jit
def block_backward_keys(
    q, k, v, grad, log_sums, delta, pairs, ends, tokens, windows, dk, dv, parts,
    B0, T, S, NB, LISTS, SELECTORS, PER_KEYS, G, K, scale,
    k_b, k_t, k_h, v_b, v_t, v_h, dk_p, dv_p,
    C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, WITH_DQ: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk [B, S, G, D], dv [B, S, G, V] of BN keys from all their readers; WITH_DQ: also dq over the softmax's scale, in
    parts [pairs, R, D].

    log_sums and delta are in the order of `pairs`. PARTS programs share a run of readers; each writes sums of its own,
    dk_p and dv_p elements apart. Keys are rows of every product, so that none takes a transposed accumulator.
    """
    share_of = tl.program_id(0) % PARTS
    piece = tl.program_id(0) // PARTS
    n = piece // (C // BN)
    in_slice = tl.program_id(1) // G
    head = tl.program_id(1) % G
    b = (B0 + in_slice).to(tl.int64)
    g = head.to(tl.int64)
    start, end = run_of(ends, (b * G + g) * NB + n, LISTS)
    d = tl.arange(0, BD)
    e = tl.arange(0, BV)
    first_key = piece * BN
    stop = S
    if windows is not None:
        first_key, stop = keys_of(windows, b, n, NB, S, C)
        first_key += piece % (C // BN) * BN
    key = first_key + tl.arange(0, BN)
    k_mask = (key < stop)[:, None] & (d < D)[None, :]
    v_mask = (key < stop)[:, None] & (e < V)[None, :]
    k_tile = tl.load(k + b * k_b + g * k_h + key[:, None].to(tl.int64) * k_t + d[None, :], mask=k_mask, other=0.0)
    v_tile = tl.load(v + b * v_b + g * v_h + key[:, None].to(tl.int64) * v_t + e[None, :], mask=v_mask, other=0.0)
    reader = key - (S - T)  # the first token that may read the key
    near = near_readers(ends, (b * G + g) * NB + n, windows, n, stop, start, T, S, LISTS, PER_KEYS, C, CHUNK)
    dk_sum = tl.zeros([BN, BD], dtype=tl.float32)
    dv_sum = tl.zeros([BN, BV], dtype=tl.float32)
    first_row = tl.cast(B0, tl.int64) * T * SELECTORS * R  # of the slice
    q += first_row * D
    grad += first_row * V
    E: tl.constexpr = BM // R
    entry = entries(pairs, start + share_of * E, end, R, BM)
    for tile in range(share_of, tl.cdiv(end - start, E), PARTS):
        real, _t, row, _part = rows_of(entry, in_slice, head, T, SELECTORS, PER_KEYS, K, R, BM)
        entry = entries(pairs, start + (tile + PARTS) * E, end, R, BM)  # the next tile's, in time
        at = row.to(tl.int64)
        x_mask = real[:, None] if D == BD else real[:, None] & (d < D)[None, :]
        y_mask = real[:, None] if V == BV else real[:, None] & (e < V)[None, :]
        x = tl.load(q + at[:, None] * D + d[None, :], mask=x_mask, other=0.0)
        y = tl.load(grad + at[:, None] * V + e[None, :], mask=y_mask, other=0.0)
        place = (start + tile * E) * R + tl.arange(0, BM)
        mine = place < end * R  # where there is no row, q and gradient are zero, and a weight of one does no harm
        if BM % R != 0:
            mine = mine & (tl.arange(0, BM) < E * R)
        log_sum = tl.load(log_sums + place, mask=mine, other=0.0)
        share = tl.load(delta + place, mask=mine, other=0.0)
        logits = tl.dot(k_tile, tl.trans(x), input_precision=PRECISION) * (scale * 1.4426950408889634)  # [BN, BM]
        p = tl.exp2(logits - log_sum[None, :])
        if tile * E < near:
            token = entries(pairs, start + tile * E, end, R, BM) >> TOKEN
            if tokens is None:
                p = tl.where(reader[:, None] <= token[None, :], p, 0.0)
            else:  # the keys' numbers are made anew: held, they would be registers too many
                here, _stop = keys_of(windows, b, n, NB, S, C)
                here += piece % (C // BN) * BN
                upto = (token - here)[None, :] - tl.arange(0, BN)[:, None]
                span = tl.where(token >= 0, token - opens_of(tokens, b, token, T), -1)
                p = tl.where((upto >= 0) & (upto <= span[None, :]), p, 0.0)
        dv_sum = tl.dot(p.to(y.dtype), y, dv_sum, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(y), input_precision=PRECISION)
        ds = (p * (dp - share[None, :])).to(x.dtype)
        if WITH_DQ:  # held from above they would take too many registers; behind the products they would be waited for
            again = entries(pairs, start + tile * E, end, R, BM)
        dk_sum = tl.dot(ds, x, dk_sum, input_precision=PRECISION)
        if WITH_DQ:
            dq = tl.dot(tl.trans(k_tile), ds, input_precision=PRECISION)  # [BD, BM]
            real, _t, _row, part = rows_of(again, in_slice, head, T, SELECTORS, PER_KEYS, K, R, BM)
            to = parts + part.to(tl.int64)[None, :] * D + d[:, None]
            there = real[None, :] if D == BD else (d < D)[:, None] & real[None, :]
            tl.store(to, dq.to(parts.dtype.element_ty), mask=there)
    # rows counted anew from the first: the keys' numbers from above would hold registers all through the loop
    if windows is not None:  # and where the block lies is read anew, likewise
        first_key, stop = keys_of(windows, b, n, NB, S, C)
        first_key += piece % (C // BN) * BN
    j = tl.arange(0, BN)
    here = (j < stop - first_key)[:, None]
    row = (b * S + first_key) * G + g
    to_k = dk + share_of.to(tl.int64) * dk_p + row * D + (j * (G * D))[:, None] + d[None, :]
    to_v = dv + share_of.to(tl.int64) * dv_p + row * V + (j * (G * V))[:, None] + e[None, :]
    tl.store(to_k, (dk_sum * scale).to(dk.dtype.element_ty), mask=here if D == BD else here & (d < D)[None, :])
    tl.store(to_v, dv_sum.to(dv.dtype.element_ty), mask=here if V == BV else here & (e < V)[None, :])


@kernel(OP, configs=[{"BLOCK": n, "num_warps": 4} for n in (1024, 2048, 512)])
@triton.jit
def block_sum_parts(parts, out, N, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [N]: sum over the first axis of parts [PARTS, N] fp32."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * N.to(tl.int64) + i, mask=i < N, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < N)


@kernel(OP, configs=tile_configs)
@triton.jit
def block_backward_queries(
    q, k, v, grad, log_sums, delta, pairs, ends, tokens, windows, parts,
    B0, T, S, NB, LISTS, SELECTORS, PER_KEYS, G, K, scale,
    k_b, k_t, k_h, v_b, v_t, v_h,
    C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """parts [pairs, R, D] of dq over the softmax's scale, for blocks too large for `block_backward_keys` to make it."""
    n = tl.program_id(0) // PARTS
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
    first_row = tl.cast(B0, tl.int64) * T * SELECTORS * R  # of the slice
    q += first_row * D
    grad += first_row * V
    log_sums += first_row
    delta += first_row
    E: tl.constexpr = BM // R
    begin, stop = keys_of(windows, b, n, NB, S, C)
    entry = entries(pairs, start + (tl.program_id(0) % PARTS) * E, end, R, BM)
    for tile in range(tl.program_id(0) % PARTS, tl.cdiv(end - start, E), PARTS):
        real, t, row, part = rows_of(entry, in_slice, head, T, SELECTORS, PER_KEYS, K, R, BM)
        entry = entries(pairs, start + (tile + PARTS) * E, end, R, BM)  # the next tile's, in time
        at = row.to(tl.int64)
        x_mask = real[:, None] if D == BD else real[:, None] & (d < D)[None, :]
        y_mask = real[:, None] if V == BV else real[:, None] & (e < V)[None, :]
        x = tl.load(q + at[:, None] * D + d[None, :], mask=x_mask, other=0.0)
        y = tl.load(grad + at[:, None] * V + e[None, :], mask=y_mask, other=0.0)
        log_sum = tl.load(log_sums + row, mask=real, other=float("inf"))  # no row, no weight
        share = tl.load(delta + row, mask=real, other=0.0)
        dq = tl.zeros([BM, BD], dtype=tl.float32)
        if tokens is not None:
            opens = opens_of(tokens, b, t, T)
        for first in range(0, C, BN):
            key = begin + first + j
            here = begin.to(tl.int64) + first
            k_tile = tl.load(k_at + here * k_t, mask=(key < stop)[:, None] & (d < D)[None, :], other=0.0)
            v_tile = tl.load(v_at + here * v_t, mask=(key < stop)[:, None] & (e < V)[None, :], other=0.0)
            logits = tl.dot(x, tl.trans(k_tile), input_precision=PRECISION) * (scale * 1.4426950408889634)
            seen = key[None, :] <= (t + S - T)[:, None]
            if tokens is not None:
                seen = seen & (key[None, :] >= opens[:, None])
            p = tl.where(seen, tl.exp2(logits - log_sum[:, None]), 0.0)
            dp = tl.dot(y, tl.trans(v_tile), input_precision=PRECISION)
            ds = (p * (dp - share[:, None])).to(x.dtype)
            dq = tl.dot(ds, k_tile, dq, input_precision=PRECISION)
        to = parts + part.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(
            to,
            dq.to(parts.dtype.element_ty),
            mask=real[:, None] if D == BD else real[:, None] & (d < D)[None, :],
        )


@kernel(OP, configs=MERGES)
@triton.jit
def block_merge_gradient(
    parts, tokens, dq, B0, ROWS, T, S, H, K, scale,
    C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dq [B, T, H, D]: scale times the sum of its blocks' parts."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)  # there are fewer than 2^31 parts
    real = row < ROWS
    t = (row // H) % T
    n_parts = parts_of(t, B0 + row // H // T, real, tokens, T, S, K, C)
    d = tl.arange(0, BD)
    at = (row // R) * K * R + row % R
    total = tl.zeros([BM, BD], dtype=tl.float32)
    for i in range(K):
        here = real & (i < n_parts)
        at_part = parts + (at + i * R).to(tl.int64)[:, None] * D + d[None, :]
        total += tl.load(at_part, mask=here[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    to = tl.cast(B0, tl.int64) * T * H + row
    tl.store(
        dq + to[:, None] * D + d[None, :],
        (total * scale).to(dq.dtype.element_ty),
        mask=real[:, None] & (d < D)[None, :],
    )
