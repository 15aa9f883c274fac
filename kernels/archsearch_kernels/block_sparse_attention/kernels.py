"""Device code of block-selected attention (MoBA, 2502.13189; NSA, 2502.11089): choice, lists, tiles, merge.

Words. A *selector* is who chooses blocks: a query head, or a group of R query heads that share keys. An *entity* is one
selector at one token, numbered (b T + t) SELECTORS + selector; it takes at most K blocks, its own among them. *Pair*
entity K + j is its j-th block in ascending order, so an entity's pairs, and their partial results, lie side by side.
`pairs` lists them sorted by (b, key head, block, token), which makes a block's readers a contiguous run: a program
loads the block once and gathers the rows that read it. An entry packs token, selector within the key head, and j, so
that nothing need be divided. Token t of a call sits at position t + S - T of the keys.

Packed documents (S = T) have blocks of their own, so a block begins anywhere: `windows` [B, NB, 2] says from which key
to which, `tokens` [B, 3, T] where a token's document begins, its own block, and how many full blocks lie before that
one. Full blocks have the lowest numbers, in their order. The ends of documents share a block where they fit, and only
their own tokens read them. Both are None without documents (`documents.py` makes them).
"""

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel

OP = "block_sparse_attention"
CHUNK = 256  # tokens of one selector whose choices are counted together
LOG2E = 1.4426950408889634
FAR = tl.constexpr(3.0e38)
TOKEN = tl.constexpr(12)  # an entry of `pairs`: token from this bit on, selector from the next, j in the lowest six
SELECTOR = tl.constexpr(6)


# ---------------------------------------------------------------------------------------------------------- choosing


@triton.jit
def keys_of(windows, b, n, NB, S, C: tl.constexpr):
    """The first key of block n of row b, and the first one behind it, or behind all where blocks are C long."""
    if windows is None:
        begin = n * C
        stop = S
    else:
        begin = tl.load(windows + (b * NB + n) * 2)
        stop = tl.load(windows + (b * NB + n) * 2 + 1)
    return begin, stop


@triton.jit
def parts_of(t, b, there, tokens, T, S, K, C: tl.constexpr):
    """How many blocks a token takes."""
    if tokens is None:
        past = (t + S - T) // C
    else:
        past = (t - tl.load(tokens + b.to(tl.int64) * 3 * T + t, mask=there, other=0)) // C
    return tl.minimum(past + 1, K)


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


@kernel(OP, configs=[{"num_warps": 4}, {"num_warps": 2}, {"num_warps": 1}, {"num_warps": 8}])
@triton.jit
def block_count(bits, counts, T, NB, CHUNKS, SELECTORS, PER_KEYS, G, WORDS, CHUNK: tl.constexpr):
    """counts [B, G, NB, CHUNKS, PER_KEYS]: how many of a selector's CHUNK tokens read a block."""
    w = tl.program_id(0)
    chunk = tl.program_id(1)
    bs = tl.program_id(2)
    b = (bs // SELECTORS).to(tl.int64)
    selector = bs % SELECTORS
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    word = tl.load(bits + (bs.to(tl.int64) * WORDS + w) * T + t, mask=t < T, other=0)
    i = tl.arange(0, 16)
    both = tl.sum((word[:, None] >> i[None, :]) & 0x10001, 0)  # of blocks i and i + 16, neither above CHUNK
    row = (b * G + selector // PER_KEYS) * NB + w * 32 + i
    to = counts + (row * CHUNKS + chunk) * PER_KEYS + selector % PER_KEYS
    tl.store(to, both & 0xFFFF, mask=w * 32 + i < NB)
    tl.store(to + 16 * CHUNKS * PER_KEYS, both >> 16, mask=w * 32 + 16 + i < NB)


@kernel(OP, configs=[{"num_warps": 8}, {"num_warps": 4}, {"num_warps": 2}])
@triton.jit
def block_list(
    bits, counts, ends, pairs, tokens, T, S, NB, CHUNKS, SELECTORS, PER_KEYS, G, WORDS,
    C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """pairs sorted by (b, key head, block, chunk, selector, token); ends: running sums of counts.

    Four counters share an integer, eight bits each: of 256 tokens, at most 255 come before another.
    """
    chunk = tl.program_id(0)
    bs = tl.program_id(1)
    b = (bs // SELECTORS).to(tl.int64)
    selector = bs % SELECTORS
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    p = tl.arange(0, 8)
    entry = (t << TOKEN) + ((selector % PER_KEYS) << SELECTOR)
    if tokens is None:
        last = (tl.minimum(chunk * CHUNK + CHUNK, T) - 1 + S - T) // C
    else:
        last = tl.max(tl.load(tokens + (b * 3 + 1) * T + t, mask=t < T, other=0), 0)
    for w in range(last // 32 + 1):
        word = tl.load(bits + (bs.to(tl.int64) * WORDS + w) * T + t, mask=t < T, other=0)
        reads = (word[:, None] >> p[None, :]) & 0x1010101  # byte c: of block 8 c + p
        earlier = tl.cumsum(reads, 0) - reads  # tokens
        in_byte = tl.sum(reads, 1)
        lower = tl.cumsum(reads, 1) - reads + (in_byte * 0x1010100)[:, None]  # blocks of this entity in this word
        for c in tl.static_range(4):
            n = w * 32 + c * 8 + p
            row = ((b * G + selector // PER_KEYS) * NB + n) * CHUNKS + chunk
            row = row * PER_KEYS + selector % PER_KEYS
            start = tl.load(ends + row, mask=n < NB, other=0) - tl.load(counts + row, mask=n < NB, other=0)
            place = start[None, :] + ((earlier >> 8 * c) & 255)
            tl.store(pairs + place, entry[:, None] + ((lower >> 8 * c) & 255), mask=((reads >> 8 * c) & 1) != 0)
        entry += (in_byte * 0x1010101) >> 24  # at most 32


# --------------------------------------------------------------------------------------------------------- attending


@triton.jit
def run_of(ends, group, LISTS):
    """Where the readers of one block begin and end in `pairs`; LISTS counts a block."""
    end = tl.load(ends + (group + 1) * LISTS - 1)
    start = tl.load(ends + tl.maximum(group * LISTS - 1, 0))
    return tl.where(group == 0, 0, start), end


@triton.jit
def near_readers(ends, group, windows, n, stop, start, T, S, LISTS, PER_KEYS, C: tl.constexpr, CHUNK: tl.constexpr):
    """How many readers of block n come before those that see all of it: those up to the chunk of its last token."""
    if windows is None:
        last = tl.minimum(tl.maximum(n * C + C - 1 - (S - T), 0), T - 1) // CHUNK
    else:
        last = tl.maximum(stop - 1, 0) // CHUNK
    return tl.load(ends + group * LISTS + (last + 1) * PER_KEYS - 1) - start


@triton.jit
def opens_of(tokens, b, t, T):
    """The first key of each token's document."""
    return tl.load(tokens + b * 3 * T + t, mask=(t >= 0) & (t < T), other=0)


@triton.jit
def entries(pairs, first, end, R: tl.constexpr, BM: tl.constexpr):
    """The entries of a tile of BM rows, R to an entry; -1 for rows that are not there."""
    row = tl.arange(0, BM)
    member = first + row // R
    there = member < end
    if BM % R != 0:
        there = there & (row < BM // R * R)
    return tl.load(pairs + member, mask=there, other=-1)


@triton.jit
def rows_of(entry, in_slice, g, T, SELECTORS, PER_KEYS, K, R: tl.constexpr, BM: tl.constexpr):
    """For the rows of a tile: whether real, their token, row (b T + t) H + h of the slice, and row of `parts`."""
    t = entry >> TOKEN
    entity = (in_slice * T + t) * SELECTORS + g * PER_KEYS + ((entry >> SELECTOR) & 63)
    r = tl.arange(0, BM) % R
    return entry >= 0, t, entity * R + r, (entity * K + (entry & 63)) * R + r


def tile_configs(arguments):
    """Rows a tile, keys a tile, and programs that share a block's readers."""
    width = max(arguments["BD"], arguments["BV"])
    c, heads = arguments["C"], arguments["R"]
    if arguments["q"].element_size() == 4:  # tf32x3: no operand of wgmma may be a register operand, so few rows
        shapes = [(16, 16, 1, 8, 1), (16, 16, 1, 4, 1)]
    elif width > 128:
        shapes = [(64, 32, 1, 8, 2), (64, 32, 2, 8, 2)]
    else:
        shapes = [
            (64, 64, 2, 4, 3), (64, 64, 4, 4, 3), (64, 64, 2, 4, 2), (64, 64, 4, 4, 2), (64, 64, 2, 4, 4),
            (64, 64, 1, 4, 3), (128, 64, 2, 8, 3), (128, 64, 4, 8, 2),
        ]  # fmt: skip
        if c >= 128:
            shapes = [(128, 64, 1, 8, 2), (128, 64, 2, 8, 2)]
    names = ("BM", "BN", "PARTS", "num_warps", "num_stages")
    made = [dict(zip(names, (max(m, heads_padded(heads)), min(n, c), *rest), strict=True)) for m, n, *rest in shapes]
    return made


def heads_padded(heads):
    """Rows that hold one entity at least."""
    return 1 << (heads - 1).bit_length()


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


# ---------------------------------------------------------------------------------------------------------- backward


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


# ------------------------------------------------------------------------------------------------------------ decode


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
