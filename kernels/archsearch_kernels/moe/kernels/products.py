"""Grouped products: rows sorted by expert (`sorting`) times the matrices of their experts.

`moe_product` is one, or the sum of two; `moe_swiglu_product` both first products of an expert and what joins them;
`moe_weight_grad` the gradient of the matrices. All of them can read a token's row where it lies, by `order`. The first
two launch as many programs as there can be tiles of rows, and find on the device which expert a tile is of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel


def narrowed(configs, arguments, halved=False):
    """Tiles no wider than the output, each once."""
    widest = max(32, triton.next_power_of_2(arguments["N"]))
    found = []
    for c in configs:
        c = {**c, "BN": min(widest, max(32, c["BN"] // 2) if halved else c["BN"])}
        if c not in found:
            found.append(c)
    return found


def product_configs(arguments):
    """Tiles by how many rows an expert has on average."""
    return narrowed(_products(arguments), arguments)


def _products(arguments):
    rows = triton.next_power_of_2(arguments["M"]) // triton.next_power_of_2(arguments["E"])
    wide = arguments["PRECISION"] is None  # 16 bits
    if not wide:
        # under 64 rows: operands that are split in registers must not feed Hopper's asynchronous product
        tiles = ((32, 64, 32, 4, 3), (32, 32, 32, 4, 3), (16, 64, 32, 4, 3), (32, 128, 32, 8, 2))
    elif rows <= 16:
        tiles = ((16, 64, 128, 4, 4), (16, 32, 128, 4, 5), (16, 128, 64, 4, 4), (16, 64, 64, 4, 5), (16, 32, 256, 4, 3))
    elif rows <= 64:
        tiles = (
            (64, 128, 64, 4, 4),
            (64, 64, 64, 4, 5),
            (16, 128, 64, 4, 4),
            (32, 128, 64, 4, 4),
            (128, 128, 64, 8, 4),
        )
    else:
        tiles = (
            (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (256, 128, 64, 8, 3),
            (64, 256, 64, 4, 4), (64, 128, 64, 4, 4), (128, 256, 64, 8, 4),
        )  # fmt: skip
    return [{"BM": m, "BN": n, "BK": k, "num_warps": w, "num_stages": s} for m, n, k, w, s in tiles]


@triton.jit
def rows_of_tile(offsets, tile, E: tl.constexpr, E_PAD: tl.constexpr, BM: tl.constexpr):
    """Expert, first row and end of a tile of BM rows, in the order of experts; expert >= E: there is no such tile."""
    e = tl.arange(0, E_PAD)
    begin = tl.load(offsets + e, mask=e < E, other=0)
    end = tl.load(offsets + e + 1, mask=e < E, other=0)
    tiles = (end - begin + BM - 1) // BM
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    first = tl.sum(tl.where(e == expert, begin, 0), 0) + (tile - before) * BM
    return expert, first, tl.sum(tl.where(e == expert, end, 0), 0)


@triton.jit
def product(
    acc, a, source, b, col, N: tl.constexpr, K: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """acc + a[source] @ b, b [K, N] with K contiguous (B_K_LAST) or N."""
    k = tl.arange(0, BK)
    a_at = a + source[:, None] * K + k[None, :]
    if B_K_LAST:
        b_at = b + col[None, :] * K + k[:, None]
    else:
        b_at = b + k[:, None] * N + col[None, :]
    for i in range(tl.cdiv(K, BK)):
        if K % BK == 0:
            x = tl.load(a_at)
            w = tl.load(b_at)
        else:
            x = tl.load(a_at, mask=k[None, :] < K - i * BK, other=0.0)
            w = tl.load(b_at, mask=k[:, None] < K - i * BK, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        a_at += BK
        b_at += BK if B_K_LAST else BK * N
    return acc


@kernel("moe", configs=product_configs)
@triton.jit
def moe_product(
    a,  # [M, K], or [tokens, K] with `order`
    order,  # [M]: row m multiplies a[order[m] // TOP_K]; None: a[m]
    b,  # [E, N, K] (B_K_LAST) or [E, K, N]
    a2,  # a second pair that is added, or None
    b2,
    out,  # [M, N]
    offsets,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    B_K_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[m] = a[m] times the matrix of m's expert. More programs than tiles: the surplus ends at once."""
    across: tl.constexpr = (N + BN - 1) // BN
    expert, first, end = rows_of_tile(offsets, tl.program_id(0) // across, E, E_PAD, BM)
    if expert >= E:
        return
    row = first + tl.arange(0, BM)
    col = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    source = tl.where(row < end, row, first)  # rows beyond repeat the first: no load needs a mask
    if order is not None:
        source = tl.load(order + source) // TOP_K
    source = source.to(tl.int64)
    real = col if N % BN == 0 else tl.where(col < N, col, 0)
    matrix = expert.to(tl.int64) * N * K
    acc = tl.zeros([BM, BN], tl.float32)
    acc = product(acc, a, source, b + matrix, real, N, K, B_K_LAST, PRECISION, BK)
    if a2 is not None:
        acc = product(acc, a2, source, b2 + matrix, real, N, K, B_K_LAST, PRECISION, BK)
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(row < end)[:, None] & (col < N)[None, :])


def pair_configs(arguments):
    """As for one product, at half the width: there are two accumulators."""
    rows = triton.next_power_of_2(arguments["M"]) // triton.next_power_of_2(arguments["E"])
    if arguments["PRECISION"] is not None or rows <= 64:
        return narrowed(_products(arguments), arguments, halved=True)
    tiles = (
        (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (128, 64, 64, 4, 4), (64, 128, 64, 8, 4),
        (256, 64, 64, 8, 3),
    )  # fmt: skip
    return narrowed(
        [{"BM": m, "BN": n, "BK": k, "num_warps": w, "num_stages": s} for m, n, k, w, s in tiles], arguments
    )


@kernel("moe", configs=pair_configs)
@triton.jit
def moe_swiglu_product(
    a,  # [tokens, K]
    order,  # [M]
    gate_proj,  # [E, N, K]
    up_proj,  # [E, N, K]
    gate,  # [M, N], or None: not wanted
    up,  # [M, N], or None
    out,  # [M, N]: silu(gate) x up
    offsets,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Both first products of an expert and what joins them; a token's row is read where it lies."""
    across: tl.constexpr = (N + BN - 1) // BN
    expert, first, end = rows_of_tile(offsets, tl.program_id(0) // across, E, E_PAD, BM)
    if expert >= E:
        return
    row = first + tl.arange(0, BM)
    col = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    source = (tl.load(order + tl.where(row < end, row, first)) // TOP_K).to(tl.int64)
    real = col if N % BN == 0 else tl.where(col < N, col, 0)
    matrix = expert.to(tl.int64) * N * K
    k = tl.arange(0, BK)
    a_at = a + source[:, None] * K + k[None, :]
    b_at = real[None, :] * K + k[:, None]
    g_at = gate_proj + matrix + b_at
    u_at = up_proj + matrix + b_at
    g = tl.zeros([BM, BN], tl.float32)
    u = tl.zeros([BM, BN], tl.float32)
    for i in range(tl.cdiv(K, BK)):
        if K % BK == 0:
            x = tl.load(a_at)
            wg = tl.load(g_at)
            wu = tl.load(u_at)
        else:
            inside = k < K - i * BK
            x = tl.load(a_at, mask=inside[None, :], other=0.0)
            wg = tl.load(g_at, mask=inside[:, None], other=0.0)
            wu = tl.load(u_at, mask=inside[:, None], other=0.0)
        g = tl.dot(x, wg, g, input_precision=PRECISION)
        u = tl.dot(x, wu, u, input_precision=PRECISION)
        a_at += BK
        g_at += BK
        u_at += BK
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    inside = (row < end)[:, None] & (col < N)[None, :]
    # rounded before they are joined, as where they are stored in between
    g_out = g.to(out.dtype.element_ty)
    u_out = u.to(out.dtype.element_ty)
    if gate is not None:
        tl.store(gate + at, g_out, mask=inside)
        tl.store(up + at, u_out, mask=inside)
    g = g_out.to(tl.float32)
    h = g / (1.0 + tl.exp(-g)) * u_out.to(tl.float32)
    tl.store(out + at, h.to(out.dtype.element_ty), mask=inside)


def weight_configs(arguments):
    if arguments["PRECISION"] is not None:
        tiles = ((32, 64, 32, 4, 2), (32, 32, 32, 4, 3), (32, 128, 32, 8, 2))
    elif arguments["y_order"] is None and arguments["x_order"] is None:
        tiles = (
            (128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4),
            (256, 128, 64, 8, 4), (64, 64, 64, 4, 4),
        )  # fmt: skip
    else:  # an index on the way to a row takes half of the stages: 5 are 3 tiles in memory
        tiles = (
            (128, 256, 64, 8, 5), (128, 256, 64, 8, 7), (128, 128, 64, 8, 7), (128, 128, 64, 4, 5),
            (256, 128, 64, 8, 5), (64, 64, 64, 4, 5),
        )  # fmt: skip
    out, into = (max(32, triton.next_power_of_2(arguments[n])) for n in ("O", "I"))
    found = []
    for o, i, k, w, s in tiles:
        config = {"BO": min(o, out), "BI": min(i, into), "BK": k, "num_warps": w, "num_stages": s}
        if config not in found:
            found.append(config)
    return found


@kernel("moe", configs=weight_configs)
@triton.jit
def moe_weight_grad(
    dy,  # [M, O], or [tokens, O] with `y_order`
    y_order,  # [M] or None
    x,  # [M, I], or [tokens, I] with `x_order`
    x_order,
    out,  # [E, O, I]
    offsets,
    M,
    O: tl.constexpr,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
):
    """out[e] = sum over e's rows of dy[m] x[m]^T: one program a tile, the rows in order."""
    across: tl.constexpr = (I + BI - 1) // BI
    down: tl.constexpr = (O + BO - 1) // BO
    pid = tl.program_id(0)
    expert = pid // (across * down)
    o = (pid // across) % down * BO + tl.arange(0, BO)
    i = pid % across * BI + tl.arange(0, BI)
    o_real = o if O % BO == 0 else tl.where(o < O, o, 0)
    i_real = i if I % BI == 0 else tl.where(i < I, i, 0)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    k = tl.arange(0, BK)
    acc = tl.zeros([BO, BI], tl.float32)
    for at in range(begin, end, BK):
        row = at + k
        inside = row < end
        y_row = row
        x_row = row
        if y_order is not None:
            y_row = tl.load(y_order + row, mask=inside, other=0) // TOP_K
        if x_order is not None:
            x_row = tl.load(x_order + row, mask=inside, other=0) // TOP_K
        d = tl.load(dy + y_row.to(tl.int64)[None, :] * O + o_real[:, None], mask=inside[None, :], other=0.0)
        v = tl.load(x + x_row.to(tl.int64)[:, None] * I + i_real[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(d, v, acc, input_precision=PRECISION)
    to = out + expert.to(tl.int64) * O * I + o.to(tl.int64)[:, None] * I + i[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(o < O)[:, None] & (i < I)[None, :])
