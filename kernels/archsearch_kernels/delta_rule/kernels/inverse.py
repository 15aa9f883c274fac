"""The inverse of a unit lower triangle of 16, 32 or 64 rows, in registers.

Its products are small ones, which run on the older instructions of the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def small_dot(a, b):
    """a b in float32, three passes of tf32: below 64 rows, on the older instructions, that is safe."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def quarters(a, HALF: tl.constexpr):
    """The four [HALF, HALF] blocks of a [2 HALF, 2 HALF] tile: upper left, upper right, lower left, lower right."""
    blocks = tl.permute(tl.reshape(a, (2, HALF, 2, HALF)), (1, 3, 0, 2))  # [row, column, lower, right]
    left, right = tl.split(blocks)
    upper_left, lower_left = tl.split(left)
    upper_right, lower_right = tl.split(right)
    return upper_left, upper_right, lower_left, lower_right


@triton.jit
def from_quarters(upper_left, upper_right, lower_left, lower_right, HALF: tl.constexpr):
    """The tile whose blocks these are."""
    blocks = tl.join(tl.join(upper_left, upper_right), tl.join(lower_left, lower_right))  # [row, column, right, lower]
    return tl.reshape(tl.permute(blocks, (3, 0, 2, 1)), (2 * HALF, 2 * HALF))


@triton.jit
def merged_inverse(p, r, q, HALF: tl.constexpr):
    """[[I + A_1, 0], [R, I + A_2]]^-1 = [[P, 0], [-Q R P, Q]] from P, R, Q [HALF, HALF]."""
    return from_quarters(p, tl.zeros((HALF, HALF), tl.float32), -small_dot(small_dot(q, r), p), q, HALF)


@triton.jit
def diagonal_inverses(a, C: tl.constexpr):
    """The inverses of the 16x16 blocks on the diagonal of I + a: [C / 16, 16, 16], a [C, C] float32.

    I + A is the product of (I + a_j e_j^T) over its columns a_j, so 15 rank-one updates of I undo one column each.
    """
    N: tl.constexpr = C // 16
    i = tl.arange(0, N)
    on = (i[:, None] == i[None, :])[:, None, :, None]
    a = tl.sum(tl.where(on, tl.reshape(a, (N, 16, N, 16)), 0.0), axis=2)  # [N, 16, 16]
    e = tl.arange(0, 16)
    row, column = e[None, :, None], e[None, None, :]
    a = tl.where(row > column, a, 0.0)
    x = tl.where(row == column, 1.0, 0.0) + tl.zeros_like(a)
    for j in range(15):
        step = tl.sum(tl.where(column == j, a, 0.0), axis=2)  # column j of A
        found = tl.sum(tl.where(row == j, x, 0.0), axis=1)  # row j so far
        x = x - step[:, :, None] * found[:, None, :]
    return x


@triton.jit
def unit_lower_inverse(a, C: tl.constexpr):
    """(I + A)^-1 [C, C] float32 of the strictly lower triangle A of `a` [C, C] float32; C is 16, 32 or 64.

    What stands on or above the diagonal of `a` is not used. 16x16 blocks are inverted by substitution in float32, then
    merged in pairs by products in tf32x3. Stable for |A_ij| <= 2 (betas up to 2 and the same key all along).
    """
    x = diagonal_inverses(a, C)
    if C == 16:
        out = tl.reshape(x, (16, 16))
    elif C == 32:
        out = _inverse_32(a, x)
    else:
        tl.static_assert(C == 64, "unit_lower_inverse takes 16, 32 or 64 rows")
        out = _inverse_64(a, x)
    return out


@triton.jit
def _inverse_32(a, x):
    """From a [32, 32] and the inverses of its diagonal blocks x [2, 16, 16]."""
    p, q = tl.split(tl.permute(x, (1, 2, 0)))
    _, _, r, _ = quarters(a, 16)
    return merged_inverse(p, r, q, 16)


@triton.jit
def _inverse_64(a, x):
    """From a [64, 64] and the inverses of its diagonal blocks x [4, 16, 16]."""
    upper, lower = tl.split(tl.permute(tl.reshape(x, (2, 2, 16, 16)), (1, 2, 3, 0)))
    a_1, _, r, a_2 = quarters(a, 32)
    return merged_inverse(_inverse_32(a_1, upper), r, _inverse_32(a_2, lower), 32)
