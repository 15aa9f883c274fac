"""Blocks on the device: what the kernels call things, where a block lies, and how many of them a token reads.

Words. A *selector* is who chooses blocks: a query head, or a group of R query heads that share keys. An *entity* is one
selector at one token, numbered (b T + t) SELECTORS + selector; it takes at most K blocks, its own among them. *Pair*
entity K + j is its j-th block in ascending order, so an entity's pairs, and their partial results, lie side by side.
Token t of a call sits at position t + S - T of the keys.

Packed documents (S = T) have blocks of their own, so a block begins anywhere: `windows` [B, NB, 2] says from which key
to which, `tokens` [B, 3, T] where a token's document begins, its own block, and how many full blocks lie before that
one. Full blocks have the lowest numbers, in their order. The ends of documents share a block where they fit, and only
their own tokens read them. Both are None without documents (`documents.py` makes them).
"""

import triton
import triton.language as tl

OP = "block_sparse_attention"


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
