"""One token: each program reads and writes a tile of a head's state once."""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.launch import grid, kernel
from archsearch_kernels.scalar_decay.kernels.decays import LOG2_E


@kernel("scalar_decay", configs=grid(BV=(32, 16, 64), num_warps=(4, 2, 8), num_stages=(1,)))
@triton.jit
def scalar_decay_token(
    q,  # [B, G, K]
    k,
    v,  # [B, H, V]
    g,  # [B, H] or [H]
    state,  # [B, H, K, V]
    new,  # may be `state`
    o,  # [B, H, V]
    H,
    scale,
    q_b,
    q_h,
    k_b,
    k_h,
    v_b,
    v_h,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    FIXED: tl.constexpr,
    BV: tl.constexpr,
):
    tiles: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    sequence = (pid // tiles).to(tl.int64)
    batch = sequence // H
    head = sequence % H
    of_k = tl.arange(0, KP)
    of_v = pid % tiles * BV + tl.arange(0, BV)
    in_k = of_k < K
    in_v = of_v < V
    at = sequence * (K * V) + of_k[:, None] * V + of_v[None, :]
    before = tl.load(state + at, mask=in_k[:, None] & in_v[None, :], other=0.0).to(tl.float32)
    qs = tl.load(q + batch * q_b + head // R * q_h + of_k, mask=in_k, other=0.0).to(tl.float32) * scale
    ks = tl.load(k + batch * k_b + head // R * k_h + of_k, mask=in_k, other=0.0).to(tl.float32)
    vs = tl.load(v + batch * v_b + head * v_h + of_v, mask=in_v, other=0.0).to(tl.float32)
    decay = tl.exp2(tl.load(g + (head if FIXED else sequence)).to(tl.float32) * LOG2_E)
    after = before * decay + ks[:, None] * vs[None, :]
    tl.store(new + at, after.to(new.dtype.element_ty), mask=in_k[:, None] & in_v[None, :])
    tl.store(o + sequence * V + of_v, tl.sum(after * qs[:, None], axis=0).to(o.dtype.element_ty), mask=in_v)
