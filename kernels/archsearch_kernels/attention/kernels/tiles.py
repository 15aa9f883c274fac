"""Tiles of rows: how they are loaded, stored and sized, and the constants of a softmax in units of log 2."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOWHERE = tl.constexpr(-1e30)  # below every score, and finite: it may be subtracted from -inf


def tiles(*rows):
    return [dict(zip(("BM", "BN", "num_warps", "num_stages"), row, strict=True)) for row in rows]


def width(a):
    return max(a["BD"], a["BV"])


def is_wide(a):
    return a["q"].element_size() == 4


@triton.jit
def _tile(base, stride, left, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CHECKED: tl.constexpr):
    """N rows of D numbers from `base`, of which `left` exist; what does not exist is 0."""
    row = tl.arange(0, N)
    d = tl.arange(0, BD)
    at = base + row[:, None] * stride + d[None, :]
    if CHECKED:
        if D == BD:
            x = tl.load(at, mask=row[:, None] < left, other=0.0)
        else:
            x = tl.load(at, mask=(row[:, None] < left) & (d[None, :] < D), other=0.0)
    else:
        if D == BD:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=d[None, :] < D, other=0.0)
    return x


@triton.jit
def _store(base, stride, left, x, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    row = tl.arange(0, N)
    d = tl.arange(0, BD)
    at = base + row[:, None] * stride + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=(row[:, None] < left) & (d[None, :] < D))
