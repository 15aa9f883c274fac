"""What is done row by row, rows sorted by expert (`sorting`): copies of tokens, SwiGLU and its gradient, and the sum of
each token's rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel


def row_configs(arguments):
    """Tiles of about 4096 numbers: a few rows by up to 1024 columns."""
    wide = min(1024, triton.next_power_of_2(arguments["D"]))
    return [
        {"ROWS": max(1, size // wide), "BD": wide, "num_warps": warps, "num_stages": 1}
        for size, warps in ((2048, 4), (1024, 4), (4096, 4), (4096, 8), (1024, 2))
    ]


@kernel("moe", configs=row_configs)
@triton.jit
def moe_gather(x, order, out, M, D: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """out [M, D]: the token of each row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    token = tl.load(order + row, mask=row < M, other=0) // TOP_K
    inside = (row[:, None] < M) & (d[None, :] < D)
    values = tl.load(x + token.to(tl.int64)[:, None] * D + d[None, :], mask=inside)
    tl.store(out + row.to(tl.int64)[:, None] * D + d[None, :], values, mask=inside)


@kernel("moe", configs=row_configs)
@triton.jit
def moe_combine(
    h,  # [M, D]
    h2,  # [M, D] to be added to h, or None
    weights,  # [N, k] fp32 or None
    place,  # [N, k]
    out,  # [N, D]
    N,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    """Each token's rows, weighed and summed in fp32."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    live = token < N
    inside = live[:, None] & (d[None, :] < D)
    total = tl.zeros([ROWS, BD], tl.float32)
    for j in tl.static_range(TOP_K):
        choice = token * TOP_K + j
        row = tl.load(place + choice, mask=live, other=0).to(tl.int64)
        values = tl.load(h + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if h2 is not None:
            values += tl.load(h2 + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if weights is not None:
            values *= tl.load(weights + choice, mask=live, other=0.0).to(tl.float32)[:, None]
        total += values
    at = token.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@kernel("moe", configs=[{"BLOCK": b, "num_warps": w, "num_stages": 1} for b, w in ((2048, 4), (1024, 4), (4096, 8))])
@triton.jit
def moe_swiglu(gate, up, out, n, BLOCK: tl.constexpr):
    """silu(gate) x up, element by element."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=at < n)


def swiglu_backward_configs(arguments):
    """One row a warp or two; tiles no wider than 2048."""
    wide = min(2048, triton.next_power_of_2(arguments["F"]))
    tiles = ((1024, 4), (2048, 4), (2048, 8), (1024, 2), (4096, 8))
    return [{"ROWS": max(1, s // wide), "BF": wide, "num_warps": w, "num_stages": 1} for s, w in tiles]


@kernel("moe", configs=swiglu_backward_configs)
@triton.jit
def moe_swiglu_backward(
    gate,  # [M, F]
    up,
    dh,  # [M, F]: gradient of silu(gate) x up, before the routing weight
    weights,  # [N, k] fp32
    order,  # [M]
    dgate,
    dup,
    weighed,  # [M, F]: silu(gate) x up x weight, what the last matrix's gradient is made of
    dweights,  # [N, k] fp32
    M,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BF: tl.constexpr,
):
    """What is left of a row between the transposed products; the weight's gradient <dy, down h> is <down^T dy, h>."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < M
    choice = tl.load(order + row, mask=live, other=0)
    w = tl.load(weights + choice, mask=live, other=0.0).to(tl.float32)[:, None]
    dw = tl.zeros([ROWS], tl.float32)
    for begin in range(0, F, BF):
        f = begin + tl.arange(0, BF)
        at = row.to(tl.int64)[:, None] * F + f[None, :]
        inside = live[:, None] & (f[None, :] < F)
        g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-g))
        silu = g * s
        h = silu * u
        dw += tl.sum(d * h, 1)
        d *= w
        tl.store(dgate + at, (d * u * (s + silu * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside)
        tl.store(dup + at, (d * silu).to(dup.dtype.element_ty), mask=inside)
        tl.store(weighed + at, (h * w).to(weighed.dtype.element_ty), mask=inside)
    tl.store(dweights + choice, dw, mask=live)
