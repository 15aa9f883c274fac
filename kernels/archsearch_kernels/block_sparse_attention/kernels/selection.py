"""Which blocks each query reads: those whose mean key fits it best, and its own.

`block_mean_keys` averages each block's keys; `block_split` writes means, and sums of heads that choose together, as two
parts of 16 bits, for products that lose nothing; `block_select` scores a tile of tokens against all means, keeps the
best in registers (`best_columns`) and writes one bit for each block.
"""

import triton
import triton.language as tl

from archsearch_kernels.block_sparse_attention.kernels.blocks import OP, keys_of
from archsearch_kernels.launch import kernel

FAR = tl.constexpr(3.0e38)


@kernel(OP, configs=[{"BC": 64, "num_warps": 4}, {"BC": 16, "num_warps": 2}, {"BC": 32, "num_warps": 4}])
@triton.jit
def block_mean_keys(
    k, means, windows, N, NB, S, G, k_b, k_t, k_h, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr
):
    """means [B, N, G, D] fp32: mean key of each of the first N blocks."""
    n = tl.program_id(0).to(tl.int64)
    b = (tl.program_id(1) // G).to(tl.int64)
    g = (tl.program_id(1) % G).to(tl.int64)
    d = tl.arange(0, BD)
    j = tl.arange(0, BC)
    total = tl.zeros([BD], dtype=tl.float32)
    begin = n * C
    here = C
    if windows is not None:  # what is no full block has a mean that nobody asks for
        begin, stop = keys_of(windows, b, n, NB, S, C)
        here = stop - begin
    for first in range(0, C, BC):
        at = k + b * k_b + (begin + first + j)[:, None] * k_t + g * k_h + d[None, :]
        x = tl.load(at, mask=(first + j < here)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    tl.store(means + ((b * N + n) * G + g) * D + d, total / C, mask=d < D)


@triton.jit
def best_columns(score, seen, n, need, NP: tl.constexpr):
    """Mask of each row's `need` largest scores among the seen ones; equal scores: lower columns first.

    score [M, NP] fp32, n [NP] the columns' numbers, need [M] at most the number of seen. The need-th largest is
    bracketed by halving: lo has at least `need` scores at or above it, hi fewer.
    """
    score = tl.where(score == score, score, -FAR)  # NaN is the least
    score = tl.minimum(tl.maximum(score, -FAR), FAR)
    score = tl.where(seen, score, float("-inf"))  # below every bracket
    peak = tl.max(score, 1)
    least = tl.min(tl.where(score >= -FAR, score, FAR), 1)
    at_peak = tl.sum((score >= peak[:, None]).to(tl.int32), 1)
    n_seen = tl.sum((score >= -FAR).to(tl.int32), 1)
    flat = at_peak >= need
    lo = tl.where(need == 0, 0.0, tl.where(flat, peak, least))
    hi = tl.where(flat, float("inf"), peak)
    above_lo = tl.where(need == 0, 0, tl.where(flat, at_peak, n_seen))  # scores >= lo
    middle = 0.5 * lo + 0.5 * hi
    open_ = (above_lo > need) & (middle > lo) & (middle < hi)
    while tl.max(open_.to(tl.int32), 0) > 0:
        above = tl.sum((score >= middle[:, None]).to(tl.int32), 1)
        up = open_ & (above >= need)
        hi = tl.where(open_ & (above < need), middle, hi)
        lo = tl.where(up, middle, lo)
        above_lo = tl.where(up, above, above_lo)
        middle = 0.5 * lo + 0.5 * hi
        open_ = (above_lo > need) & (middle > lo) & (middle < hi)
    # a bracket that cannot shrink and holds too many: all of [lo, hi) is one number; take its first columns
    cut = tl.zeros_like(need)
    if tl.max((above_lo > need).to(tl.int32), 0) > 0:
        equal = (score >= lo[:, None]) & (score < hi[:, None])
        room = need - tl.sum((score >= hi[:, None]).to(tl.int32), 1)
        for i in range(13):  # NP is at most 4096
            step = NP >> i
            taken = tl.sum((equal & (n[None, :] < (cut + step)[:, None])).to(tl.int32), 1)
            cut = tl.where(taken <= room, cut + step, cut)
    cut = tl.where(above_lo > need, cut, 2 * NP)
    lo, hi = tl.where(need > 0, lo, float("inf")), tl.where(need > 0, hi, float("inf"))
    return (score >= hi[:, None]) | ((score >= lo[:, None]) & (n[None, :] < cut[:, None]))


@kernel(OP, configs=[{"BM": m, "num_warps": w} for m, w in ((8, 4), (16, 4), (32, 4), (4, 4), (16, 8))])
@triton.jit
def block_split(
    x, parts, ROWS, T, SELECTORS, x_b, x_t, x_h, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr
):
    """parts [2, B, T, SELECTORS, D] of 16 bits: a large and a small one of the sums of each R heads of x."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    b = (row // (T * SELECTORS)).to(tl.int64)
    t = (row // SELECTORS % T).to(tl.int64)
    d = tl.arange(0, BD)
    mask = (row < ROWS)[:, None] & (d < D)[None, :]
    at = x + (b * x_b + t * x_t + (row % SELECTORS) * R * x_h)[:, None] + d[None, :]
    total = tl.zeros([BM, BD], dtype=tl.float32)
    for r in range(R):
        total += tl.load(at + r * x_h, mask=mask, other=0.0).to(tl.float32)
    large = total.to(parts.dtype.element_ty)
    to = parts + row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(to, large, mask=mask)
    tl.store(to + tl.cast(ROWS, tl.int64) * D, (total - large.to(tl.float32)).to(large.dtype), mask=mask)


def select_configs(arguments):
    """A tile's scores stay in registers, 64 rows of them where they fit: fewer would read the means more often."""
    n = arguments["NP"]
    if arguments["PRODUCTS"] == 1:  # tf32x3: below 64 rows, so that no operand is a register operand of wgmma
        tiles = [(32, 16, 4, 2), (32, 16, 8, 2)] if n <= 128 else [(32, 16, 8, 1), (16, 16, 8, 1)] if n <= 256 else []
        tiles = tiles or [(16, 16, 8, 1)]
    elif n <= 128:
        tiles = [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (64, 64, 8, 3), (128, 64, 8, 3), (64, 32, 4, 3)]
    elif n <= 256:
        tiles = [(64, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 4), (32, 32, 4, 1)]
    elif n <= 512:
        tiles = [(64, 64, 16, 3), (64, 64, 16, 2), (64, 64, 8, 3), (32, 32, 8, 1)]
    else:
        tiles = [(16, 16, 8, 1), (16, 16, 16, 1)]
    if n > 1024:
        tiles = [(16, 16, 16, 1)]
    return [{"BT": t, "BK": min(k, arguments["BD"]), "num_warps": w, "num_stages": s} for t, k, w, s in tiles]


@kernel(OP, configs=select_configs)
@triton.jit
def block_select(
    rows, means, bits, tokens, FROM, TO, T, S, SELECTORS, PER_KEYS, WORDS, top_k,
    x_p, x_b, x_t, x_h, m_p, m_b, m_n, m_h,
    C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, NP: tl.constexpr, PRODUCTS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """bits [B, SELECTORS, WORDS, T] of the tokens FROM to TO, which have fewer than NP blocks.

    Bit n % 32 of word n // 32 says that the entity reads block n. A score is the product of the means with R heads'
    rows, both in float32 (PRODUCTS 1); or of the means in two parts with rows of 16 bits (2); or of the means in two
    parts and rows in two, less the product of the small ones (3).
    """
    bs = tl.program_id(1)
    b = (bs // SELECTORS).to(tl.int64)
    selector = (bs % SELECTORS).to(tl.int64)
    begin = FROM + tl.program_id(0) * BT
    t = begin + tl.arange(0, BT)
    n = tl.arange(0, NP)
    if tokens is None:
        own = (t + S - T) // C
        last = (tl.minimum(begin + BT, TO) - 1 + S - T) // C
    else:
        at = tokens + b * 3 * T + t
        past = (t - tl.load(at, mask=t < TO, other=0)) // C
        own = tl.load(at + T, mask=t < TO, other=0)
        ahead = tl.load(at + 2 * T, mask=t < TO, other=0)
        past = tl.minimum(past, ahead)  # rows beyond TO have none
        last = tl.max(ahead, 0)
    score = tl.zeros([BT, NP], dtype=tl.float32)
    means += b * m_b + (selector // PER_KEYS) * m_h
    rows += b * x_b + selector * R * x_h
    for step in range(PRODUCTS * (BD // BK)):  # one product a step: of two, one would hold the scores otherwise
        part = step // (BD // BK)
        d = step % (BD // BK) * BK + tl.arange(0, BK)
        to_mean = n * m_n if PRODUCTS > 1 else n.to(tl.int64) * m_n  # parts are dense and small: 32 bits reach them all
        to_mean = means + tl.where(part == 1, m_p, 0) + to_mean[None, :] + d[:, None]
        m = tl.load(to_mean, mask=(n < last)[None, :] & (d < D)[:, None], other=0.0)
        to_row = rows + tl.where(part == 2, x_p, 0) + t[:, None].to(tl.int64) * x_t + d[None, :]
        real = (t < TO)[:, None] & (d < D)[None, :]
        x = tl.load(to_row, mask=real, other=0.0)
        if PRODUCTS == 1:
            x = x.to(tl.float32)
            for r in tl.static_range(1, R):  # the sum of the heads' scores is the score of their sum
                x += tl.load(to_row + r * x_h, mask=real, other=0.0).to(tl.float32)
            score = tl.dot(x, m, score, input_precision="tf32x3")
        else:
            score = tl.dot(x, m, score)
    if tokens is None:
        seen = n[None, :] < own[:, None]
        chosen = best_columns(score, seen, n, tl.minimum(own, top_k - 1), NP)
    else:  # the full blocks of the document
        seen = (n[None, :] < ahead[:, None]) & (n[None, :] >= (ahead - past)[:, None])
        chosen = best_columns(score, seen, n, tl.minimum(past, top_k - 1), NP)
    chosen = chosen | (n[None, :] == own[:, None])
    flags = chosen.to(tl.int32) << (n % 32)[None, :]
    words = tl.sum(tl.reshape(flags, [BT, NP // 32, 32]), 2)
    w = tl.arange(0, NP // 32)
    at = bits + (bs.to(tl.int64) * WORDS + w[None, :]) * T + t[:, None]
    tl.store(at, words, mask=(t < TO)[:, None] & (w < WORDS)[None, :])
    for w in range(NP // 32, WORDS):
        word = tl.zeros([BT], dtype=tl.int32)
        if tokens is not None:  # own blocks that end a document have numbers above all columns
            word = tl.where(own // 32 == w, 1 << (own % 32), 0)
        tl.store(bits + (bs.to(tl.int64) * WORDS + w) * T + t, word, mask=t < TO)
