"""One token: each program reads and writes some values of a head's state once."""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.gla.kernels.decays import LOG2E
from archsearch_kernels.launch import grid, kernel


@kernel("gla", configs=lambda arguments: grid(BV=(16, 32, 64), num_warps=(4, 2), num_stages=(1,)))
@triton.jit
def gla_step_kernel(
    q, k, v, g, state, new_state, o, scale, H, q_row, k_row, v_row, g_row,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token: the state is read and written once. Rows are those of [B, H D]; new_state may be state."""
    n_tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % n_tiles
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    n, m = tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    square = bh * K * V + n[:, None] * V + m[None, :]
    in_square = (n < K)[:, None] & (m < V)[None, :]
    q_row_of = tl.load(q + b * q_row + h * K + n, mask=n < K, other=0.0).to(tl.float32) * scale
    k_row_of = tl.load(k + b * k_row + h * K + n, mask=n < K, other=0.0).to(tl.float32)
    g_row_of = tl.load(g + b * g_row + h * K + n, mask=n < K, other=0.0).to(tl.float32)
    v_row_of = tl.load(v + b * v_row + h * V + m, mask=m < V, other=0.0).to(tl.float32)
    found = tl.load(state + square, mask=in_square, other=0.0)
    found = found * tl.exp2(g_row_of * LOG2E)[:, None] + k_row_of[:, None] * v_row_of[None, :]
    tl.store(new_state + square, found, mask=in_square)
    read = tl.sum(found * q_row_of[:, None], axis=0)
    tl.store(o + bh * V + m, read.to(o.dtype.element_ty), mask=m < V)
