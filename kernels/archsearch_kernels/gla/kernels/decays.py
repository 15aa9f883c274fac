"""What a chunk's kernels share on the device: tiles of rows, documents, and the decays between the tokens of a chunk.

Two tokens of a chunk meet under a decay of their own for every feature. With the sums of the log decays between each
token and the middle of the chunk, that decay is one factor for the later token (a row of a product) times one for the
earlier (a column): `up` and `down`, each other's inverse. If the decays are strong, these factors would overflow: then
only pairs of a left and a right token are met this way, whose factors are at most one both, and either half is halved
in turn, down to blocks weak enough or to neighbours. The exponents are products of a matrix of ones and zeros with the
log decays: sums of what lies between, never differences, exact for any strength. Those matrices come as a table,
`spans`: to compute them took as long as all the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 64  # tokens; the shapes of the intermediates follow it
C = tl.constexpr(CHUNK)
LEVELS = tl.constexpr(6)  # halvings of a chunk
UNTIL, SINCE = tl.constexpr(6), tl.constexpr(7)  # behind them in the table
LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-104.0)  # e^-104 is 0 in float32; a number of bfloat16, and no infinity to subtract
WEAK, WEAK_16 = tl.constexpr(57.0), tl.constexpr(6.0)  # 2^(2 WEAK) times a sum of products is a float32; of float16


@triton.jit
def sums(ones, x, WIDE: tl.constexpr):
    """Rows of x [C, N] added up where `ones` [C, C] has them; in float32, or nearly (16 bits) for 16-bit operands."""
    if x.dtype == tl.bfloat16:
        return tl.dot(ones, x)
    if WIDE:
        return tl.dot(ones.to(tl.float32), x, input_precision="ieee")
    coarse = x.to(tl.bfloat16)
    return tl.dot(ones, (x - coarse.to(tl.float32)).to(tl.bfloat16), tl.dot(ones, coarse))


@triton.jit
def between(spans, level, i, j, g, WIDE: tl.constexpr):
    """Log2 of decays [C, N]. Levels 0 to 5: in blocks of 2^(level + 1) tokens from the left half's tokens to the
    middle, and from there to the right half's. UNTIL: from a token to the chunk's end. SINCE: from before the chunk to
    a token."""
    ones = tl.load(spans + level * C * C + i[:, None] * C + j[None, :])
    return sums(ones, g, WIDE) * LOG2E


@triton.jit
def factors(apart, i, level, HALF: tl.constexpr):
    """Of `between` at a level: the factors up and down [C, N] of the later and the earlier token of a pair, and whether
    the decays are weak."""
    LIMIT: tl.constexpr = WEAK_16 if HALF else WEAK
    weak = tl.min(tl.min(apart, axis=0), axis=0) >= -LIMIT
    apart = tl.where(((i >> level) & 1)[:, None] == 1, apart, -apart)
    return tl.exp2(tl.minimum(apart, LIMIT)), tl.exp2(tl.minimum(-apart, LIMIT)), weak  # finite where of no use


@triton.jit
def met_before(i, level, weak):
    """Bounds [C] of the earlier tokens that each token meets at a level: those of the left half of a block of
    2^(level + 1) if it is in the right half; with weak decays all of the block. (Bounds cost fewer registers than a
    mask, which the compiler prepares outside of the loop.)"""
    start = (i >> (level + 1)) << (level + 1)
    middle = start + (1 << level)
    return start, tl.where(weak, i, tl.where(i >= middle, middle, start))


@triton.jit
def met_after(i, level, weak):
    """The same of the later tokens."""
    start = (i >> (level + 1)) << (level + 1)
    middle, end = start + (1 << level), start + (2 << level)
    return tl.where(weak, i + 1, tl.where(i < middle, middle, end)), end


@triton.jit
def within(j, bounds):
    """Which columns [C, C] lie within the bounds of each row."""
    start, end = bounds
    return (j[None, :] >= start[:, None]) & (j[None, :] < end[:, None])


@triton.jit
def load_rows(x, first, row, column, i, n, inside, WIDTH: tl.constexpr):
    """A tile [C, N] of a tensor [B, T, H, D]: tokens from `first` on, features from `column` of a row on."""
    x += first * row + column  # 64 bits once, 32 for every lane
    return tl.load(x + (i[:, None] * row + n[None, :]), mask=inside[:, None] & (n[None, :] < WIDTH), other=0.0)


@triton.jit
def load_decays(g, first, row, column, i, n, inside, WIDTH: tl.constexpr):
    """Log decays, none below FLOOR, in bfloat16 if they came so and else in float32."""
    tile = tl.maximum(load_rows(g, first, row, column, i, n, inside, WIDTH).to(tl.float32), FLOOR)
    if g.dtype.element_ty == tl.bfloat16:
        tile = tile.to(tl.bfloat16)
    return tile


@triton.jit
def store_rows(x, tile, first, row, column, i, n, inside, WIDTH: tl.constexpr):
    x += first * row + column
    at = x + (i[:, None] * row + n[None, :])
    tl.store(at, tile.to(x.dtype.element_ty), mask=inside[:, None] & (n[None, :] < WIDTH))


@triton.jit
def documents(seq_idx, origin, start, i, inside, T):
    """Of a chunk: each token's document, and those of the tokens before the chunk and at its end."""
    doc = tl.load(seq_idx + origin + start + i, mask=inside, other=-1)
    before = tl.load(seq_idx + origin + tl.maximum(start - 1, 0))
    last = tl.load(seq_idx + origin + tl.minimum(start + C, T) - 1)
    return doc, before, last


@triton.jit
def strengths(beta, first, row, h, i, inside):
    """How strongly each token [C] writes: beta, or 1 without."""
    if beta is None:
        out = tl.full(i.shape, 1.0, tl.float32)
    else:
        out = tl.load(beta + (first + i) * row + h, mask=inside, other=0.0).to(tl.float32)
    return out
