"""Device code of the mixture of experts: choosing, sorting by expert, grouped products, and what lies between them.

A row is one choice of one token; rows are sorted by expert, expert e owning rows offsets[e] to offsets[e + 1]. `order`
names the choice (token x k + rank) that sits in a row, `place` the row of a choice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel

SORT_BLOCK = 512  # choices a program of the sort handles: fixed, the table of counts has a row for each
SORT_ONE = 512  # up to here one program sorts them all


# --- choosing ---


def route_configs(arguments):
    rows = max(1, 1024 // arguments["E_PAD"])
    return [{"ROWS": min(64, rows * m), "num_warps": w, "num_stages": 1} for m, w in ((1, 2), (2, 4), (1, 4), (4, 8))]


@kernel("moe", configs=route_configs)
@triton.jit
def moe_route(
    logits,  # [N, E] fp32
    bias,  # [E] fp32 or None
    weights,  # [N, k] fp32
    chosen,  # [N, k] int64
    N,
    scale: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The k largest of each row one after the other, the first of equals first."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, E_PAD)
    real = (row[:, None] < N) & (e[None, :] < E)
    at = row.to(tl.int64)[:, None] * E + e[None, :]
    x = tl.load(logits + at, mask=real, other=0.0)
    if SOFTMAX:
        x = tl.where(e[None, :] < E, x, -float("inf"))
        p = tl.exp(x - tl.max(x, 1)[:, None])
        scores = p / tl.sum(p, 1)[:, None]
        ranked = x  # softmax keeps the order, and rounds no two together
    else:
        scores = 1.0 / (1.0 + tl.exp(-x))
        ranked = scores
        if bias is not None:
            ranked += tl.load(bias + e, mask=e < E, other=0.0)[None, :]
    ranked = tl.where(e[None, :] < E, ranked, -float("inf"))
    # a row of NaN chooses the first experts rather than none
    ranked = tl.where(ranked == ranked, ranked, -3.0e38)
    free = (e[None, :] < E) & (row[:, None] >= 0)
    rank = tl.arange(0, K_PAD)
    picked_scores = tl.zeros([ROWS, K_PAD], tl.float32)
    picked = tl.zeros([ROWS, K_PAD], tl.int32)
    for j in tl.static_range(TOP_K):
        best = tl.max(tl.where(free, ranked, -float("inf")), 1)
        ties = free & (ranked == best[:, None])
        expert = tl.min(tl.where(ties, e[None, :], E_PAD), 1)
        score = tl.sum(tl.where(e[None, :] == expert[:, None], scores, 0.0), 1)
        free = free & (e[None, :] != expert[:, None])
        picked = tl.where(rank[None, :] == j, expert[:, None], picked)
        picked_scores = tl.where(rank[None, :] == j, score[:, None], picked_scores)
    if TOP_K > 1:
        picked_scores = picked_scores / tl.maximum(tl.sum(picked_scores, 1), 1e-20)[:, None]
    out = row.to(tl.int64)[:, None] * TOP_K + rank[None, :]
    inside = (row[:, None] < N) & (rank[None, :] < TOP_K)
    tl.store(weights + out, picked_scores * scale, mask=inside)
    tl.store(chosen + out, picked.to(tl.int64), mask=inside)


@kernel("moe", configs=route_configs)
@triton.jit
def moe_route_backward(
    logits,
    chosen,
    grad,  # [N, k] fp32: of the weights
    dlogits,  # [N, E] fp32
    N,
    scale: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Through the division by the sum, then softmax or sigmoid."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, E_PAD)
    real = (row[:, None] < N) & (e[None, :] < E)
    at = row.to(tl.int64)[:, None] * E + e[None, :]
    x = tl.load(logits + at, mask=real, other=0.0)
    if SOFTMAX:
        x = tl.where(e[None, :] < E, x, -float("inf"))
        p = tl.exp(x - tl.max(x, 1)[:, None])
        scores = p / tl.sum(p, 1)[:, None]
    else:
        scores = 1.0 / (1.0 + tl.exp(-x))
    mine = tl.zeros([ROWS, E_PAD], tl.float32)  # 1 where chosen
    dw = tl.zeros([ROWS, E_PAD], tl.float32)  # gradient of the weight where chosen
    for j in tl.static_range(TOP_K):
        inside = row < N
        expert = tl.load(chosen + row.to(tl.int64) * TOP_K + j, mask=inside, other=0).to(tl.int32)
        g = tl.load(grad + row.to(tl.int64) * TOP_K + j, mask=inside, other=0.0) * scale
        hit = e[None, :] == expert[:, None]
        mine = tl.where(hit, 1.0, mine)
        dw = tl.where(hit, g[:, None], dw)
    if TOP_K > 1:
        total = tl.maximum(tl.sum(scores * mine, 1), 1e-20)
        mean = tl.sum(dw * scores * mine, 1) / total
        ds = (dw - mean[:, None]) * mine / total[:, None]
    else:
        ds = dw
    if SOFTMAX:
        dx = scores * (ds - tl.sum(ds * scores, 1)[:, None])
    else:
        dx = scores * (1.0 - scores) * ds
    tl.store(dlogits + at, dx, mask=real)


# --- sorting: a counting sort, stable, with as many bins as experts ---


@triton.jit
def one_hot(chosen, at, M, e):
    """[rows, experts]: 1 where a choice falls on an expert; 0 for choices there are not."""
    expert = tl.load(chosen + at, mask=at < M, other=-1).to(tl.int32)
    return (expert[:, None] == e[None, :]).to(tl.int32)


@kernel("moe", configs=lambda a: [{"num_warps": w, "num_stages": 1} for w in (4, 8)])
@triton.jit
def moe_count(chosen, counts, M, E_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """counts [blocks, E_PAD]: how often a block chose each expert."""
    block = tl.program_id(0)
    e = tl.arange(0, E_PAD)
    found = tl.zeros([E_PAD], tl.int32)
    for i in range(0, BLOCK, ROWS):
        found += tl.sum(one_hot(chosen, block * BLOCK + i + tl.arange(0, ROWS), M, e), 0)
    tl.store(counts + block * E_PAD + e, found)


@kernel("moe", configs=lambda a: [{"num_warps": w, "num_stages": 1} for w in (4, 8)])
@triton.jit
def moe_offsets(counts, offsets, starts, blocks, E: tl.constexpr, E_PAD: tl.constexpr, ROWS: tl.constexpr):
    """offsets [E + 1], and starts [blocks, E_PAD]: the row of a block's first choice of each expert. One program."""
    e = tl.arange(0, E_PAD)
    b = tl.arange(0, ROWS)
    total = tl.zeros([E_PAD], tl.int32)
    for i in range(0, blocks, ROWS):
        here = tl.load(counts + (i + b)[:, None] * E_PAD + e[None, :], mask=(i + b)[:, None] < blocks, other=0)
        total += tl.sum(here, 0)
    end = tl.cumsum(total, 0)
    tl.store(offsets + 1 + e, end, mask=e < E)
    tl.store(offsets + e, tl.zeros([E_PAD], tl.int32), mask=e < 1)
    running = end - total
    for i in range(0, blocks, ROWS):
        at = (i + b)[:, None] * E_PAD + e[None, :]
        inside = (i + b)[:, None] < blocks
        here = tl.load(counts + at, mask=inside, other=0)
        tl.store(starts + at, running[None, :] + tl.cumsum(here, 0) - here, mask=inside)
        running += tl.sum(here, 0)


@kernel("moe", configs=lambda a: [{"num_warps": w, "num_stages": 1} for w in (4, 8)])
@triton.jit
def moe_place(chosen, starts, place, order, M, E_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Every choice's row, and every row's choice."""
    block = tl.program_id(0)
    e = tl.arange(0, E_PAD)
    running = tl.load(starts + block * E_PAD + e)
    for i in range(0, BLOCK, ROWS):
        at = block * BLOCK + i + tl.arange(0, ROWS)
        hits = one_hot(chosen, at, M, e)
        row = tl.sum(hits * (running[None, :] + tl.cumsum(hits, 0) - 1), 1)
        tl.store(place + at, row, mask=at < M)
        tl.store(order + row, at, mask=at < M)
        running += tl.sum(hits, 0)


@kernel("moe", configs=lambda a: [{"num_warps": w, "num_stages": 1} for w in (8, 4)])
@triton.jit
def moe_sort(chosen, offsets, place, order, M, E: tl.constexpr, E_PAD: tl.constexpr, ROWS: tl.constexpr):
    """All of the sort in one program, for few choices."""
    e = tl.arange(0, E_PAD)
    total = tl.zeros([E_PAD], tl.int32)
    for i in range(0, M, ROWS):
        total += tl.sum(one_hot(chosen, i + tl.arange(0, ROWS), M, e), 0)
    end = tl.cumsum(total, 0)
    tl.store(offsets + 1 + e, end, mask=e < E)
    tl.store(offsets + e, tl.zeros([E_PAD], tl.int32), mask=e < 1)
    running = end - total
    for i in range(0, M, ROWS):
        at = i + tl.arange(0, ROWS)
        hits = one_hot(chosen, at, M, e)
        row = tl.sum(hits * (running[None, :] + tl.cumsum(hits, 0) - 1), 1)
        tl.store(place + at, row, mask=at < M)
        tl.store(order + row, at, mask=at < M)
        running += tl.sum(hits, 0)


# --- between the products ---


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


# --- grouped products ---


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
