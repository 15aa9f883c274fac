"""Choices sorted by expert: a counting sort, stable, with as many bins as experts.

A row is one choice of one token; rows are sorted by expert, expert e owning rows offsets[e] to offsets[e + 1]. `order`
names the choice (token x k + rank) that sits in a row, `place` the row of a choice.

Few choices are sorted by one program (`moe_sort`). Of many, `moe_count` counts how often each block of them chose each
expert, `moe_offsets` makes of that where an expert's rows begin and where each block's share of them does, `moe_place`
writes the choices there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel

SORT_BLOCK = 512  # choices a program of the sort handles: fixed, the table of counts has a row for each
SORT_ONE = 512  # up to here one program sorts them all


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
