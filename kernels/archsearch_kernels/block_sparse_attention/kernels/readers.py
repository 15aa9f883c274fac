"""The readers of every block: `block_count` and `block_list` turn bits into `pairs`; how a program walks through them.

`pairs` lists the pairs sorted by (b, key head, block, token), which makes a block's readers a contiguous run: a program
loads the block once and gathers the rows that read it. An entry packs token, selector within the key head, and j, so
that nothing need be divided. Between the two kernels torch makes the running sums `ends` of the counts: where each
chunk of tokens of each selector begins in `pairs`.
"""

import triton
import triton.language as tl

from archsearch_kernels.block_sparse_attention.kernels.blocks import OP
from archsearch_kernels.launch import kernel

CHUNK = 256  # tokens of one selector whose choices are counted together
TOKEN = tl.constexpr(12)  # an entry of `pairs`: token from this bit on, selector from the next, j in the lowest six
SELECTOR = tl.constexpr(6)


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


def heads_padded(heads):
    """Rows that hold one entity at least."""
    return 1 << (heads - 1).bit_length()
