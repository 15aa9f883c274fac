"""Device code of the selective scan: a program walks the tokens of one part of a sequence, for 32 channels.

Where sequences times channels do not fill the card, sequences are cut into parts. Three launches then do the work of
one: what every part makes of nothing, with the product of its decays; the states at the borders; the outputs.
Gradients of states walk the other way in the same manner. Tokens are read a few at a time, so that a program waits
once for all of them; the backward pass keeps the states of only the first of them in memory. All that is read of
states lies as they do, [N, D], and so a thread gets four channels of four states: sums over either take few exchanges
between threads. The gradients of B and C sum over channels and come as one partial sum per program. Exponents are in
base 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from archsearch_kernels.launch import Arguments, Config, grid, kernel

LOG2_E = tl.constexpr(1.4426950408889634)


def _scan_configs(arguments: Arguments) -> Sequence[Config]:
    """A thread's registers hold 16 states, and fewer where warps have to meet anyway."""
    states = arguments["NP"]
    return grid(num_warps=(1, 2) if states <= 16 else (min(16, states // 8), min(8, states // 16)), num_stages=(1,))


def _backward_configs(arguments: Arguments) -> Sequence[Config]:
    """Where one warp walks, it is first kept to registers that leave a multiprocessor room for 12: enough, but where
    channels are no multiple of 16 and addresses take more."""
    found = list(_scan_configs(arguments))
    return [{**found[0], "maxnreg": 168}, *found] if arguments["NP"] <= 16 else found


@triton.jit
def _tokens(x, t, end, stride, features, mask, G: tl.constexpr):
    """Features of the G tokens from t on, in float32; zeros from `end` on."""
    rows = ()
    at = x + tl.cast(t, tl.int64) * stride + features
    for i in tl.static_range(G):
        row = tl.load(at + i * stride, mask=mask & (t + i < end), other=0.0).to(tl.float32)
        rows += (row,)
    return rows


@triton.jit
def _decays(rates, dts, seq, t, end, G: tl.constexpr):
    """Decays of the G tokens from t on: 0 where a document begins, 1 from `end` on."""
    rows = ()
    for i in tl.static_range(G):
        decay = tl.exp2(rates * dts[i][None, :])
        if seq is not None:
            now = tl.minimum(t + i, end - 1)
            same = tl.load(seq + tl.maximum(now - 1, 0)) == tl.load(seq + now)
            decay = tl.where(same | (t + i >= end), decay, 0.0)
        rows += (decay,)
    return rows


def _parts_configs(arguments: Arguments) -> Sequence[Config]:
    """From the end, two warps come first: 0.55 ms where one takes 0.72 (B2 T8192 D4096 N16 on an H200)."""
    found = list(_scan_configs(arguments))
    return found[::-1] if arguments["REVERSE"] and arguments["NP"] <= 16 else found


@kernel("selective_scan", configs=_parts_configs)
@triton.jit
def selective_scan_parts(
    x,  # [B, T, D] what is written; of gradients: of y
    dt,  # [B, T, D]
    a,  # [N, D]: as states lie, so that threads find the rates of theirs
    b,  # [B, T, N] where to; of gradients: c
    seq,  # [B, T] or None
    decays,  # [B, parts - 1, N, D] float32: of all tokens of a part
    ends,  # [B, parts - 1, N, D] float32: the state that a part makes of nothing
    T,
    D,
    parts,
    length,  # of a part in tokens, a multiple of G
    x_b,
    x_t,
    dt_b,
    dt_t,
    b_b,
    b_t,
    N: tl.constexpr,
    NP: tl.constexpr,
    BD: tl.constexpr,
    G: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Of all parts but the last, or, walking the other way, of all but the first."""
    tiles = tl.cdiv(D, BD)
    row = tl.program_id(0) // tiles
    batch = (row // (parts - 1)).to(tl.int64)
    d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    in_d = d < D
    in_n = n < N
    real = in_n[:, None] & in_d[None, :]
    state_at = n[:, None] * D + d[None, :]
    at = row.to(tl.int64) * N * D + state_at
    start = (row % (parts - 1) + REVERSE) * length
    end = tl.minimum(start + length, T)
    x += batch * x_b
    dt += batch * dt_b
    b += batch * b_b
    if seq is not None:
        seq += batch * T
    rates = tl.load(a + state_at, mask=real, other=0.0).to(tl.float32) * LOG2_E
    h = tl.zeros([NP, BD], tl.float32)
    product = tl.full([NP, BD], 1.0, tl.float32)
    groups = tl.cdiv(end - start, G)
    for step in range(groups):
        t = start + (groups - 1 - step if REVERSE else step) * G
        xs = _tokens(x, t, end, x_t, d, in_d, G)
        dts = _tokens(dt, t, end, dt_t, d, in_d, G)
        bs = _tokens(b, t, end, b_t, n, in_n, G)
        by = _decays(rates, dts, seq, t, end, G)
        if REVERSE:
            for i in tl.static_range(G - 1, -1, -1):
                h = (h + bs[i][:, None] * xs[i][None, :]) * by[i]
                product *= by[i]
        else:
            for i in tl.static_range(G):
                h = h * by[i] + bs[i][:, None] * (dts[i] * xs[i])[None, :]
                product *= by[i]
    tl.store(ends + at, h, mask=real)
    tl.store(decays + at, product, mask=real)


@kernel("selective_scan", configs=grid(num_warps=(4, 1), num_stages=(1,)))
@triton.jit
def selective_scan_borders(
    first,  # [B, N, D] or None: what the first part finds, or, walking the other way, the last
    decays,  # [B, parts - 1, N, D]
    ends,
    found,  # [B, parts, N, D] float32
    parts,
    ND,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What every part finds."""
    blocks = tl.cdiv(ND, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    real = i < ND
    h = tl.zeros([BLOCK], tl.float32)
    if first is not None:
        h += tl.load(first + batch * ND + i, mask=real, other=0.0).to(tl.float32)
    for step in range(parts - 1):
        before = parts - 2 - step if REVERSE else step
        part = parts - 1 - step if REVERSE else step
        tl.store(found + (batch * parts + part) * ND + i, h, mask=real)
        at = (batch * (parts - 1) + before) * ND + i
        h = h * tl.load(decays + at, mask=real, other=0.0) + tl.load(ends + at, mask=real, other=0.0)
    tl.store(found + (batch * parts + (0 if REVERSE else parts - 1)) * ND + i, h, mask=real)


@kernel("selective_scan", configs=_scan_configs)
@triton.jit
def selective_scan_forward(
    x,  # [B, T, D]
    dt,  # [B, T, D]
    a,  # [N, D]: as states lie, so that threads find the rates of theirs
    b,  # [B, T, N]
    c,  # [B, T, N]
    seq,  # [B, T] or None
    first,  # [B, parts, N, D] or None: the state that each part finds
    y,  # [B, T, D]
    found,  # [B, chunks, N, D] float32, the state that each chunk finds, or None
    last,  # [B, N, D] float32
    T,
    D,
    parts,
    length,  # of a part in tokens, a multiple of C
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
    G: tl.constexpr,
):
    tiles = tl.cdiv(D, BD)
    row = tl.program_id(0) // tiles
    part = row % parts
    batch = (row // parts).to(tl.int64)
    d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    in_d = d < D
    in_n = n < N
    real = in_n[:, None] & in_d[None, :]
    state_at = n[:, None] * D + d[None, :]
    end = tl.minimum(part * length + length, T)
    x += batch * x_b
    dt += batch * dt_b
    b += batch * b_b
    c += batch * c_b
    y += batch * T * D
    if seq is not None:
        seq += batch * T
    rates = tl.load(a + state_at, mask=real, other=0.0).to(tl.float32) * LOG2_E
    h = tl.zeros([NP, BD], tl.float32)
    if first is not None:
        h += tl.load(first + row.to(tl.int64) * N * D + state_at, mask=real, other=0.0).to(tl.float32)
    chunks = tl.cdiv(T, C)
    for chunk in range(part * length // C, tl.cdiv(end, C)):
        if found is not None:
            tl.store(found + (batch * chunks + chunk) * N * D + state_at, h, mask=real)
        for t in range(chunk * C, tl.minimum(chunk * C + C, end), G):
            xs = _tokens(x, t, end, x_t, d, in_d, G)
            dts = _tokens(dt, t, end, dt_t, d, in_d, G)
            bs = _tokens(b, t, end, b_t, n, in_n, G)
            cs = _tokens(c, t, end, c_t, n, in_n, G)
            by = _decays(rates, dts, seq, t, end, G)
            for i in tl.static_range(G):
                h = h * by[i] + bs[i][:, None] * (dts[i] * xs[i])[None, :]
                out = tl.sum(h * cs[i][:, None], axis=0)
                at = y + tl.cast(t + i, tl.int64) * D + d
                tl.store(at, out.to(y.dtype.element_ty), mask=in_d & (t + i < end))
    if part == parts - 1:
        tl.store(last + batch * N * D + state_at, h, mask=real)


@kernel("selective_scan", configs=_backward_configs)
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
    d_last,  # [B, parts, N, D] float32 or None: the gradient of the state that each part leaves
    states,  # [B, parts, C / G, N, D] float32: those of one chunk at a time, before every G tokens
    d_x,  # [B, T, D]
    d_dt,  # [B, T, D] float32
    d_a,  # [B, parts, N, D] float32
    d_b,  # [tiles, B, T, N] float32, of each program's channels
    d_c,
    d_first,  # [B, N, D] float32
    B,
    T,
    D,
    parts,
    length,
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
    G: tl.constexpr,
):
    tiles = tl.cdiv(D, BD)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(0) // tiles % parts
    batch = row // parts
    d = tile * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    in_d = d < D
    in_n = n < N
    real = in_n[:, None] & in_d[None, :]
    state_at = n[:, None] * D + d[None, :]
    end = tl.minimum(part * length + length, T)
    x += batch * x_b
    dt += batch * dt_b
    b += batch * b_b
    c += batch * c_b
    d_y += batch * y_b
    d_x += batch * T * D
    d_dt += batch * T * D
    d_b += (tile.to(tl.int64) * B + batch) * T * N
    d_c += (tile.to(tl.int64) * B + batch) * T * N
    if seq is not None:
        seq += batch * T
    states += row * (C // G) * N * D + state_at
    rates = tl.load(a + state_at, mask=real, other=0.0).to(tl.float32) * LOG2_E
    dh = tl.zeros([NP, BD], tl.float32)
    if d_last is not None:
        dh += tl.load(d_last + row * N * D + state_at, mask=real, other=0.0)
    da = tl.zeros([NP, BD], tl.float32)
    chunks = tl.cdiv(T, C)
    past = tl.cdiv(end, C)
    for back in range(past - part * length // C):
        chunk = past - 1 - back
        start = chunk * C
        groups = tl.cdiv(tl.minimum(C, end - start), G)
        h = tl.load(found + (batch * chunks + chunk) * N * D + state_at, mask=real, other=0.0)
        tl.debug_barrier()  # the states of the chunk after this one have been read
        for group in range(groups):
            t = start + group * G
            xs = _tokens(x, t, end, x_t, d, in_d, G)
            dts = _tokens(dt, t, end, dt_t, d, in_d, G)
            bs = _tokens(b, t, end, b_t, n, in_n, G)
            dys = _tokens(d_y, t, end, y_t, d, in_d, G)
            by = _decays(rates, dts, seq, t, end, G)
            tl.store(states + tl.cast(group, tl.int64) * N * D, h, mask=real)
            for i in tl.static_range(G):
                h = h * by[i] + bs[i][:, None] * (dts[i] * xs[i])[None, :]
                at = d_c + tl.cast(t + i, tl.int64) * N + n
                tl.store(at, tl.sum(h * dys[i][None, :], axis=1), mask=in_n & (t + i < end))
        tl.debug_barrier()
        for left in range(groups):
            group = groups - 1 - left
            t = start + group * G
            h = tl.load(states + tl.cast(group, tl.int64) * N * D, mask=real, other=0.0)
            xs = _tokens(x, t, end, x_t, d, in_d, G)
            dts = _tokens(dt, t, end, dt_t, d, in_d, G)
            bs = _tokens(b, t, end, b_t, n, in_n, G)
            cs = _tokens(c, t, end, c_t, n, in_n, G)
            dys = _tokens(d_y, t, end, y_t, d, in_d, G)
            by = _decays(rates, dts, seq, t, end, G)
            hs = (h,)
            for i in tl.static_range(G - 1):
                hs += (hs[i] * by[i] + bs[i][:, None] * (dts[i] * xs[i])[None, :],)
            for i in tl.static_range(G - 1, -1, -1):
                at = tl.cast(t + i, tl.int64)
                inside = t + i < end
                dh += cs[i][:, None] * dys[i][None, :]
                d_b_now = tl.sum(dh * (dts[i] * xs[i])[None, :], axis=1)
                tl.store(d_b + at * N + n, d_b_now, mask=in_n & inside)
                du = tl.sum(dh * bs[i][:, None], axis=0)
                dh *= by[i]
                turned = dh * hs[i]  # gradient of dt a
                da += turned * dts[i][None, :]
                d_dt_now = tl.sum(turned * rates, axis=0) / LOG2_E + du * xs[i]
                tl.store(d_dt + at * D + d, d_dt_now, mask=in_d & inside)
                tl.store(d_x + at * D + d, (du * dts[i]).to(d_x.dtype.element_ty), mask=in_d & inside)
    if part == 0:
        tl.store(d_first + batch * N * D + state_at, dh, mask=real)
    tl.store(d_a + row * N * D + state_at, da, mask=real)


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
