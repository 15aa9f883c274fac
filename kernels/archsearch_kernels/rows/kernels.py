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


def sum_configs(arguments):
    """All rows of a block of columns at once, up to 1024; narrow blocks where columns are few, to fill the device."""
    P, columns = arguments["P"], arguments["D"] * arguments["J"]
    rows = min(1024, max(32, triton.next_power_of_2(P)))
    width = 16 if columns < 8192 else 32
    found = [(rows, width, 8), (rows, 48 - width, 8), (rows, width, 4 if rows <= 512 else 16)]
    found += [(min(rows, n), d, w) for n, d, w in ((128, 32, 8), (128, 16, 4), (64, 64, 8), (32, 32, 4))]
    return [{"BP": n, "BD": d, "num_warps": w} for n, d, w in dict.fromkeys(found)]


@kernel("rows", configs=sum_configs)
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
