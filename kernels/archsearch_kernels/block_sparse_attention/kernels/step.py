"""One query over a cache: `block_step_scores` scores the means, `block_step` finds the best blocks and reads them where
they lie, each program a share of them; `block_step_merge` adds up the shares where there are several."""

import triton
import triton.language as tl

from archsearch_kernels.block_sparse_attention.kernels.blocks import OP
from archsearch_kernels.block_sparse_attention.kernels.selection import best_columns
from archsearch_kernels.launch import kernel


@kernel(OP, configs=[{"BN": n, "num_warps": w} for n, w in ((32, 4), (16, 4), (64, 4), (64, 8), (16, 2))])
@triton.jit
def block_step_scores(
    q, means, scores, N, SELECTORS, PER_KEYS, q_b, q_h, m_b, m_n, m_h,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """scores [B, SELECTORS, N] fp32 of one query."""
    bs = tl.program_id(1)
    b = (bs // SELECTORS).to(tl.int64)
    selector = (bs % SELECTORS).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    x = tl.zeros([BD], dtype=tl.float32)
    for r in tl.static_range(R):
        x += tl.load(q + b * q_b + (selector * R + r) * q_h + d, mask=d < D, other=0.0).to(tl.float32)
    at = means + b * m_b + n[:, None].to(tl.int64) * m_n + (selector // PER_KEYS) * m_h + d[None, :]
    m = tl.load(at, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
    tl.store(scores + bs.to(tl.int64) * N + n, tl.sum(m * x[None, :], 1), mask=n < N)


def step_configs(arguments):
    c = arguments["C"]
    if arguments["k"].element_size() == 4:
        return [{"BN": 16, "num_warps": 4, "num_stages": s} for s in (1, 2)]
    return [
        {"BN": min(c, n), "num_warps": w, "num_stages": s}
        for n, w, s in ((64, 4, 2), (32, 4, 3), (128, 4, 2), (64, 8, 2), (32, 2, 2))
    ]


@kernel(OP, configs=step_configs)
@triton.jit
def block_step(
    q, k, v, scores, parts, peaks, S, N, SELECTORS, PER_KEYS, top_k, scale,
    q_b, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, NP: tl.constexpr, PRECISION: tl.constexpr, SHARES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One query over each SHARES-th of its blocks: parts [B H, SHARES, V] normalised, peaks [B H, SHARES] log2 sums."""
    share = tl.program_id(0)
    bs = tl.program_id(1)
    b = (bs // SELECTORS).to(tl.int64)
    selector = (bs % SELECTORS).to(tl.int64)
    g = selector // PER_KEYS
    n = tl.arange(0, NP)
    score = tl.load(scores + bs.to(tl.int64) * N + n, mask=n < N, other=0.0)[None, :]
    need = tl.full([1], 0, dtype=tl.int32) + tl.minimum(N, top_k - 1)
    chosen = best_columns(score, (n < N)[None, :], n, need, NP) | (n == N)[None, :]
    flags = chosen.to(tl.int32)
    rank = tl.cumsum(flags, 1) - flags
    r = tl.arange(0, RP)
    d = tl.arange(0, BD)
    e = tl.arange(0, BV)
    j = tl.arange(0, BN)
    rows = q + b * q_b + (selector * R + r)[:, None] * q_h + d[None, :]
    x = tl.load(rows, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
    k_at = k + b * k_b + g * k_h + j[:, None].to(tl.int64) * k_t + d[None, :]
    v_at = v + b * v_b + g * v_h + j[:, None].to(tl.int64) * v_t + e[None, :]
    peak = tl.full([RP], -1.0e30, dtype=tl.float32)
    total = tl.zeros([RP], dtype=tl.float32)
    out = tl.zeros([RP, BV], dtype=tl.float32)
    for i in range(share, tl.minimum(N, top_k - 1) + 1, SHARES):
        block = tl.sum(tl.sum(tl.where((rank == i) & chosen, n[None, :], 0), 1), 0)
        for first in range(0, C, BN):
            here = block.to(tl.int64) * C + first
            real = here + j < S
            k_tile = tl.load(k_at + here * k_t, mask=real[:, None] & (d < D)[None, :], other=0.0)
            v_tile = tl.load(v_at + here * v_t, mask=real[:, None] & (e < V)[None, :], other=0.0)
            logits = tl.dot(x, tl.trans(k_tile), input_precision=PRECISION) * (scale * 1.4426950408889634)
            logits = tl.where(real[None, :], logits, float("-inf"))
            higher = tl.maximum(peak, tl.max(logits, 1))
            shrink = tl.exp2(peak - higher)
            p = tl.exp2(logits - higher[:, None])
            total = total * shrink + tl.sum(p, 1)
            out = tl.dot(p.to(v_tile.dtype), v_tile, out * shrink[:, None], input_precision=PRECISION)
            peak = higher
    row = ((b * SELECTORS + selector) * R + r) * SHARES + share
    some = tl.where(total > 0.0, total, 1.0)
    out_at = parts + row[:, None] * V + e[None, :]
    out = out / some[:, None]
    tl.store(out_at, out.to(parts.dtype.element_ty), mask=(r < R)[:, None] & (e < V)[None, :])
    tl.store(peaks + row, tl.where(total > 0.0, peak + tl.log2(some), float("-inf")), mask=r < R)


@kernel(OP, configs=[{"num_warps": 1}, {"num_warps": 2}, {"num_warps": 4}])
@triton.jit
def block_step_merge(parts, peaks, out, SHARES: tl.constexpr, SP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """out [rows, V] from the shares of each row."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SP)
    e = tl.arange(0, BV)
    peak = tl.load(peaks + row * SHARES + s, mask=s < SHARES, other=float("-inf"))
    weight = tl.exp2(peak - tl.max(peak, 0))
    at = parts + (row * SHARES + s)[:, None] * V + e[None, :]
    part = tl.load(at, mask=(s < SHARES)[:, None] & (e < V)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * V + e, total.to(out.dtype.element_ty), mask=e < V)
