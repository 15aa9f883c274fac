"""Which keys a tile of rows sees, which rows see a tile of keys, and in what order programs take their tiles."""

import triton
import triton.language as tl


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
