"""The experts of each token: the k best scores, their weights, and the gradient of the logits."""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel


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
