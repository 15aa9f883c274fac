"""One token: each program reads and writes a tile of a head's state once.

Mamba-2's step sizes, decays and skip are made on the way, since at one token each would be a launch of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.device_math import softplus
from archsearch_kernels.launch import grid, kernel
from archsearch_kernels.scalar_decay.kernels.decays import LOG2_E


@kernel("scalar_decay", configs=grid(BV=(32, 16, 64), num_warps=(4, 2, 8), num_stages=(1,)))
@triton.jit
def scalar_decay_token(
    q,  # [B, G, K]
    k,
    v,  # [B, H, V]
    g,  # [B, H] or [H]: log decays; with A_log as projected, for steps softplus(g + dt_bias)
    A_log,  # [H] or None
    dt_bias,  # [H]
    skip,  # [H]
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
    g_b,
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
    log_decay = tl.load(g + (head if FIXED else batch * g_b + head)).to(tl.float32)
    written = vs
    if A_log is not None:
        dt = softplus(log_decay + tl.load(dt_bias + head).to(tl.float32))
        log_decay = -tl.exp(tl.load(A_log + head).to(tl.float32)) * dt
        written = vs * dt
    after = before * tl.exp2(log_decay * LOG2_E) + ks[:, None] * written[None, :]
    read = tl.sum(after * qs[:, None], axis=0)
    if A_log is not None:
        read += tl.load(skip + head).to(tl.float32) * vs
    tl.store(new + at, after.to(new.dtype.element_ty), mask=in_k[:, None] & in_v[None, :])
    tl.store(o + sequence * V + of_v, read.to(o.dtype.element_ty), mask=in_v)
