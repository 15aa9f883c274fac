"""Device code that the memory-bound operations share: where a row starts, and sums of partial sums."""
# ruff: noqa: RET505  (what follows a static `return` would be compiled)

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel


@triton.jit
def row_offset(rows, outer, step, INNER: tl.constexpr):
    """Where rows start whose tensor was laid out by `as_rows`."""
    if INNER == 1:
        return rows.to(tl.int64) * outer
    else:
        return (rows // INNER).to(tl.int64) * outer + (rows % INNER).to(tl.int64) * step


SUM_CONFIGS = [
    {"BP": 128, "BD": 32, "num_warps": 8},
    {"BP": 128, "BD": 16, "num_warps": 4},
    {"BP": 64, "BD": 64, "num_warps": 8},
    {"BP": 32, "BD": 32, "num_warps": 4},
]


@kernel("rows", configs=SUM_CONFIGS)
@triton.jit(do_not_specialize=["P"])
def sum_partials(
    partial,  # [P, J, D] fp32
    weight,  # [D, W]: the sums of the first W of J
    bias,  # [D]: the sum of the last, or None
    P,
    D: tl.constexpr,
    J: tl.constexpr,
    W: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    j = tl.program_id(1)
    p = tl.arange(0, BP)
    sums = tl.zeros((BP, BD), tl.float32)
    for start in range(0, P, BP):
        at = (start + p).to(tl.int64)[:, None] * (J * D) + j * D + d[None, :]
        sums += tl.load(partial + at, mask=((start + p) < P)[:, None] & (d < D)[None, :], other=0.0)
    total = tl.sum(sums, axis=0)
    if j < W:
        tl.store(weight + d * W + j, total, mask=d < D)
    elif bias is not None:
        tl.store(bias + d, total, mask=d < D)
