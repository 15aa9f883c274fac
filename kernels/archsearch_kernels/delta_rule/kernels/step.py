"""One token: each program reads and writes some values of a head's state once.

What a token's projections give is made into unit keys, steps and decays on the way, since at one token each of these
would be a launch that takes longer than its work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.delta_rule.kernels.chunks import LOG2E, covers
from archsearch_kernels.device_math import softplus
from archsearch_kernels.launch import kernel


def token_configs(arguments):
    """Narrow tiles where few heads would leave multiprocessors idle."""
    o, V = arguments["o"], arguments["V"]
    shapes = [(32, 4), (16, 4), (16, 2), (32, 2), (32, 8), (64, 4), (64, 8), (128, 8)]
    if o.numel() // V * triton.cdiv(V, 32) < 132:
        shapes[:2] = [(16, 4), (32, 4)]
    return [{"BV": w, "num_warps": n, "num_stages": 1} for w, n in shapes]


@kernel("delta_rule", configs=token_configs)
@triton.jit(do_not_specialize=["H"])
def delta_rule_token(
    q, k, v, beta, g, A_log, dt_bias, state, o, new, H, RATIO, scale, max_beta, eps,
    q_b, q_h, k_b, k_h, v_b, v_h, beta_b, g_b, state_b, state_h,
    RAW: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token: a program owns BV values of a head with all features; `new` may be `state`.

    RAW: q and k of any length, beta and g as projected; g then decays by -e^A_log softplus(g + dt_bias).
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    value = (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    feature = tl.arange(0, KP)
    real, valued = covers(feature, K, KP), covers(value, V, BV)
    inside = real[:, None] & valued[None, :]
    in_state = b * state_b + h * state_h + feature[:, None] * V + value[None, :]
    s = tl.load(state + in_state, mask=inside, other=0.0).to(tl.float32)  # [K, BV]
    q_ = tl.load(q + b * q_b + (h // RATIO) * q_h + feature, mask=real, other=0.0).to(tl.float32)
    k_ = tl.load(k + b * k_b + (h // RATIO) * k_h + feature, mask=real, other=0.0).to(tl.float32)
    v_ = tl.load(v + b * v_b + h * v_h + value, mask=valued, other=0.0).to(tl.float32)
    step = tl.load(beta + b * beta_b + h).to(tl.float32)
    if RAW:
        q_ *= tl.rsqrt(tl.sum(q_ * q_, axis=0) + eps)
        k_ *= tl.rsqrt(tl.sum(k_ * k_, axis=0) + eps)
        step = max_beta * tl.sigmoid(step)
    if g is not None:
        log_decay = tl.load(g + b * g_b + h).to(tl.float32)
        if RAW:
            rate = tl.exp(tl.load(A_log + h).to(tl.float32))
            log_decay = -rate * softplus(log_decay + tl.load(dt_bias + h).to(tl.float32))
        s *= tl.exp2(log_decay * LOG2E)
    write = step * (v_ - tl.sum(k_[:, None] * s, axis=0))
    s += k_[:, None] * write[None, :]
    o_ = tl.sum(q_[:, None] * s, axis=0) * scale
    tl.store(new + in_state, s.to(new.dtype.element_ty), mask=inside)
    tl.store(o + (head * V) + value, o_.to(o.dtype.element_ty), mask=valued)
