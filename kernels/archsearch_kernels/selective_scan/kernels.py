"""Device code of the selective scan: a program walks the tokens of 32 channels, their states in its registers.

A thread holds all states of one channel, so that reading them (y, dx, ddt) takes no exchange between threads; the
gradients of B and C do, and come as one partial sum per program. Exponents are in base 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from archsearch_kernels.launch import Arguments, Config, grid, kernel

LOG2_E = tl.constexpr(1.4426950408889634)


def _scan_configs(arguments: Arguments) -> Sequence[Config]:
    """A thread's registers hold 16 states of a channel, and fewer where warps have to meet anyway."""
    states = arguments["NP"]
    return grid(num_warps=(1, 2) if states <= 16 else (min(16, states // 8), min(8, states // 16)), num_stages=(1,))


@triton.jit
def _at(x, t, stride, features, mask):
    """Features of token t in float32."""
    return tl.load(x + tl.cast(t, tl.int64) * stride + features, mask=mask, other=0.0).to(tl.float32)


@kernel("selective_scan", configs=_scan_configs)
@triton.jit
def selective_scan_forward(
    x,  # [B, T, D]
    dt,  # [B, T, D]
    a,  # [D, N]
    b,  # [B, T, N]
    c,  # [B, T, N]
    seq,  # [B, T] or None
    first,  # [B, N, D] or None
    y,  # [B, T, D]
    found,  # [B, chunks, N, D] float32, the state that each chunk finds, or None
    last,  # [B, N, D] float32
    T,
    D,
    x_b,
    x_t,
    dt_b,
    dt_t,
    b_b,
    b_t,
    c_b,
    c_t,
    N: tl.constexpr,
    NP: tl.constexpr,
    BD: tl.constexpr,
    C: tl.constexpr,
):
    tiles = tl.cdiv(D, BD)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    in_d = d < D
    in_n = n < N
    every = n[:, None] + 0 * d[None, :]  # all threads read the same B and C, each for itself
    real = in_n[:, None] & in_d[None, :]
    state_at = n[:, None] * D + d[None, :]
    x += batch * x_b
    dt += batch * dt_b
    b += batch * b_b
    c += batch * c_b
    y += batch * T * D
    rates = tl.load(a + d[None, :] * N + n[:, None], mask=real, other=0.0).to(tl.float32) * LOG2_E
    h = tl.zeros([NP, BD], tl.float32)
    if first is not None:
        h += tl.load(first + batch * N * D + state_at, mask=real, other=0.0).to(tl.float32)
    chunks = tl.cdiv(T, C)
    zero = tl.program_id(0) * 0
    x_next = _at(x, zero, x_t, d, in_d)
    dt_next = _at(dt, zero, dt_t, d, in_d)
    b_next = _at(b, zero, b_t, every, real)
    c_next = _at(c, zero, c_t, every, real)
    for chunk in range(chunks):
        if found is not None:
            tl.store(found + (batch * chunks + chunk) * N * D + state_at, h, mask=real)
        for t in range(chunk * C, tl.minimum(chunk * C + C, T)):
            x_now, dt_now, b_now, c_now = x_next, dt_next, b_next, c_next
            more = t + 1 < T
            x_next = _at(x, t + 1, x_t, d, in_d & more)
            dt_next = _at(dt, t + 1, dt_t, d, in_d & more)
            b_next = _at(b, t + 1, b_t, every, real & more)
            c_next = _at(c, t + 1, c_t, every, real & more)
            decay = tl.exp2(rates * dt_now[None, :])
            if seq is not None:
                before = tl.load(seq + batch * T + tl.maximum(t - 1, 0))
                decay = tl.where(before == tl.load(seq + batch * T + t), decay, 0.0)
            h = h * decay + b_now * (dt_now * x_now)[None, :]
            out = tl.sum(h * c_now, axis=0)
            tl.store(y + tl.cast(t, tl.int64) * D + d, out.to(y.dtype.element_ty), mask=in_d)
    tl.store(last + batch * N * D + state_at, h, mask=real)


@kernel("selective_scan", configs=_scan_configs)
@triton.jit
def selective_scan_backward(
    x,
    dt,
    a,
    b,
    c,
    seq,
    found,
    d_y,  # [B, T, D]
    d_last,  # [B, N, D] float32 or None
    states,  # [B, C, N, D] float32: those of one chunk at a time, each before its token
    d_x,  # [B, T, D]
    d_dt,  # [B, T, D] float32
    d_a,  # [B, N, D] float32, of each sequence
    d_b,  # [tiles, B, T, N] float32, of each program's channels
    d_c,
    d_first,  # [B, N, D] float32
    B,
    T,
    D,
    x_b,
    x_t,
    dt_b,
    dt_t,
    b_b,
    b_t,
    c_b,
    c_t,
    y_b,
    y_t,
    N: tl.constexpr,
    NP: tl.constexpr,
    BD: tl.constexpr,
    C: tl.constexpr,
):
    tiles = tl.cdiv(D, BD)
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    d = tile * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    in_d = d < D
    in_n = n < N
    every = n[:, None] + 0 * d[None, :]
    real = in_n[:, None] & in_d[None, :]
    state_at = n[:, None] * D + d[None, :]
    x += batch * x_b
    dt += batch * dt_b
    b += batch * b_b
    c += batch * c_b
    d_y += batch * y_b
    seq_at = batch * T
    states += batch * C * N * D + state_at
    parts = (tile.to(tl.int64) * B + batch) * T * N
    one = tl.load(a + d[None, :] * N + n[:, None], mask=real, other=0.0).to(tl.float32)
    rates = one * LOG2_E
    dh = tl.zeros([NP, BD], tl.float32)
    if d_last is not None:
        dh += tl.load(d_last + batch * N * D + state_at, mask=real, other=0.0)
    da = tl.zeros([NP, BD], tl.float32)
    chunks = tl.cdiv(T, C)
    for back in range(chunks):
        chunk = chunks - 1 - back
        start = chunk * C
        length = tl.minimum(C, T - start)
        h = tl.load(found + (batch * chunks + chunk) * N * D + state_at, mask=real, other=0.0)
        tl.debug_barrier()  # the chunk after this one has been read
        x_next = _at(x, start, x_t, d, in_d)
        dt_next = _at(dt, start, dt_t, d, in_d)
        b_next = _at(b, start, b_t, every, real)
        for i in range(length):
            t = start + i
            x_now, dt_now, b_now = x_next, dt_next, b_next
            more = i + 1 < length
            x_next = _at(x, t + 1, x_t, d, in_d & more)
            dt_next = _at(dt, t + 1, dt_t, d, in_d & more)
            b_next = _at(b, t + 1, b_t, every, real & more)
            tl.store(states + tl.cast(i, tl.int64) * N * D, h, mask=real)
            decay = tl.exp2(rates * dt_now[None, :])
            if seq is not None:
                before = tl.load(seq + seq_at + tl.maximum(t - 1, 0))
                decay = tl.where(before == tl.load(seq + seq_at + t), decay, 0.0)
            h = h * decay + b_now * (dt_now * x_now)[None, :]
        tl.debug_barrier()
        end = start + length - 1
        x_next = _at(x, end, x_t, d, in_d)
        dt_next = _at(dt, end, dt_t, d, in_d)
        b_next = _at(b, end, b_t, every, real)
        c_next = _at(c, end, c_t, every, real)
        dy_next = _at(d_y, end, y_t, d, in_d)
        h_next = tl.load(states + tl.cast(length - 1, tl.int64) * N * D, mask=real, other=0.0)
        for i in range(length):
            t = end - i
            x_now, dt_now, b_now, c_now, dy_now, h = x_next, dt_next, b_next, c_next, dy_next, h_next
            more = t > start
            x_next = _at(x, t - 1, x_t, d, in_d & more)
            dt_next = _at(dt, t - 1, dt_t, d, in_d & more)
            b_next = _at(b, t - 1, b_t, every, real & more)
            c_next = _at(c, t - 1, c_t, every, real & more)
            dy_next = _at(d_y, t - 1, y_t, d, in_d & more)
            h_next = tl.load(states + tl.cast(t - 1 - start, tl.int64) * N * D, mask=real & more, other=0.0)
            decay = tl.exp2(rates * dt_now[None, :])
            if seq is not None:
                before = tl.load(seq + seq_at + tl.maximum(t - 1, 0))
                decay = tl.where(before == tl.load(seq + seq_at + t), decay, 0.0)
            u = dt_now * x_now
            kept = h * decay
            row = parts + tl.cast(t, tl.int64) * N + n
            tl.store(d_c + row, tl.sum((kept + b_now * u[None, :]) * dy_now[None, :], axis=1), mask=in_n)
            dh += c_now * dy_now[None, :]
            tl.store(d_b + row, tl.sum(dh * u[None, :], axis=1), mask=in_n)
            du = tl.sum(dh * b_now, axis=0)
            turned = dh * kept  # gradient of dt a
            da += turned * dt_now[None, :]
            at = (batch * T + t) * D + d
            tl.store(d_dt + at, tl.sum(turned * one, axis=0) + du * x_now, mask=in_d)
            tl.store(d_x + at, (du * dt_now).to(d_x.dtype.element_ty), mask=in_d)
            dh = dh * decay
    tl.store(d_first + batch * N * D + state_at, dh, mask=real)
    tl.store(d_a + batch * N * D + state_at, da, mask=real)


@kernel("selective_scan", configs=grid(num_warps=(4, 1, 2), num_stages=(1,)))
@triton.jit
def selective_scan_token(
    x,  # [B, D]
    dt,
    a,  # [D, N]
    b,  # [B, N]
    c,
    state,  # [B, N, D]
    new,  # may be `state`
    y,  # [B, D]
    D,
    x_b,
    dt_b,
    b_b,
    c_b,
    N: tl.constexpr,
    NP: tl.constexpr,
    BD: tl.constexpr,
):
    tiles = tl.cdiv(D, BD)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    in_d = d < D
    in_n = n < N
    real = in_n[:, None] & in_d[None, :]
    at = batch * N * D + n[:, None] * D + d[None, :]
    before = tl.load(state + at, mask=real, other=0.0).to(tl.float32)
    rates = tl.load(a + d[None, :] * N + n[:, None], mask=real, other=0.0).to(tl.float32) * LOG2_E
    x_now = tl.load(x + batch * x_b + d, mask=in_d, other=0.0).to(tl.float32)
    dt_now = tl.load(dt + batch * dt_b + d, mask=in_d, other=0.0).to(tl.float32)
    b_now = tl.load(b + batch * b_b + n, mask=in_n, other=0.0).to(tl.float32)
    c_now = tl.load(c + batch * c_b + n, mask=in_n, other=0.0).to(tl.float32)
    after = before * tl.exp2(rates * dt_now[None, :]) + b_now[:, None] * (dt_now * x_now)[None, :]
    tl.store(new + at, after.to(new.dtype.element_ty), mask=real)
    tl.store(y + batch * D + d, tl.sum(after * c_now[:, None], axis=0).to(y.dtype.element_ty), mask=in_d)
