"""Device code of the short convolution: a program walks over the tokens of some features and keeps the last W - 1 rows.

Every input is read once and widened once. Rows are loaded several at a time, before any is stored, so that enough of
them are on their way; in the backward pass, which computes more, the next of them too. At the boundary of a document
the kept rows are zeroed.
"""
# ruff: noqa: RUF005, SIM102  (tuples cannot be unpacked; a static and a run-time condition cannot be joined)

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel

LOG2E = tl.constexpr(1.4426950408889634)


def _features(arguments, found):
    """Configurations no wider than the features need; of many taps, those that hold four features a thread at most."""
    if arguments["W"] > 4:
        found = [c for c in found if c["BD"] <= 128 * c["num_warps"]]
    most = max(triton.next_power_of_2(arguments["D"]), 32)
    narrowed = (c | {"BD": min(c["BD"], most), "num_warps": max(1, min(c["num_warps"], most // 64))} for c in found)
    return list({tuple(c.items()): c for c in narrowed}.values())


def forward_configs(arguments):
    """Tokens a program: 64, or fewer where that leaves the device idle. More warps go with as many more features."""
    B, T, D = arguments["x"].shape
    BT = next((t for t in (64, 32) if B * -(-T // t) * -(-D // 256) > 2000), 16)
    if arguments["W"] > 4:
        found = [(512, BT, 4, 4), (128, BT, 4, 1), (64, BT, 8, 1)]
    else:
        found = [(128, BT, 8, 1), (256, BT, 8, 2), (128, BT // 2, 8, 1), (512, BT, 8, 4)]
    return _features(arguments, [{"BD": d, "BT": t, "U": u, "num_warps": w} for d, t, u, w in found])


def backward_configs(arguments):
    """Four features a thread, four rows at a time. Bounds on registers let more programs run; more taps want more."""
    names = ("BD", "U", "num_warps", "maxnreg")
    free = _features(arguments, [dict(zip(names, c, strict=False)) for c in ((128, 4, 1), (256, 4, 2), (64, 8, 1))])
    if arguments["W"] > 4:
        return free
    bound = [(128, 4, 1, 128), (128, 4, 1, 112), (256, 4, 2, 128), (64, 8, 1, 80)]
    return [*_features(arguments, [dict(zip(names, c, strict=True)) for c in bound]), free[0]]


def step_configs(arguments):
    if arguments["new_state"] is arguments["state"]:  # running it again would shift the state again
        return _features(arguments, [{"BD": 256, "num_warps": 2}])
    return _features(arguments, [{"BD": d, "num_warps": w} for d, w in ((256, 2), (512, 2), (128, 1), (1024, 4))])


@triton.jit
def row_before(x, state, at, state_at, t, d_mask, W: tl.constexpr, x_token, state_token):
    """Row t of the inputs, from the state where t < 0, in fp32."""
    row = tl.load(x + at + t.to(tl.int64) * x_token, mask=d_mask & (t >= 0), other=0.0)
    if state is not None:
        kept = tl.load(state + state_at + (t + W - 1).to(tl.int64) * state_token, mask=d_mask & (t < 0), other=0.0)
        row += kept.to(row.dtype)
    return row.to(tl.float32)


@triton.jit
def rows_from(x, t, end, x_token, d_mask, U: tl.constexpr):
    """Rows t to t + U - 1 as they lie in memory, zeros from `end` on."""
    rows = ()
    row = x + tl.cast(t, tl.int64) * x_token
    for u in tl.static_range(U):
        rows = rows + (tl.load(row, mask=d_mask & (t + u < end), other=0.0),)
        row += x_token
    return rows


@triton.jit
def where_all(same, rows, N: tl.constexpr):
    """Rows, or zeros at the boundary of a document."""
    kept = ()
    for i in tl.static_range(N):
        kept = kept + (tl.where(same, rows[i], 0.0),)
    return kept


@triton.jit
def rows_before(
    x, state, seq_idx, at, state_at, seq_at, first, d_mask, W: tl.constexpr, x_token, state_token, seq_token
):
    """The W - 1 rows before `first`, without those of other documents than the last of them; and its document."""
    past = ()
    before = 0
    if seq_idx is not None:
        before = tl.load(seq_idx + seq_at + tl.maximum(first - (W - 1), 0).to(tl.int64) * seq_token)
    for i in tl.static_range(W - 1):
        t = first - (W - 1) + i
        if seq_idx is not None:
            here = tl.load(seq_idx + seq_at + tl.maximum(t, 0).to(tl.int64) * seq_token)
            past = where_all(here == before, past, i)
            before = here
            past = past + (row_before(x, None, at, state_at, t, d_mask, W, x_token, state_token),)
        else:
            past = past + (row_before(x, state, at, state_at, t, d_mask, W, x_token, state_token),)
    if W == 1 and seq_idx is not None:
        before = tl.load(seq_idx + seq_at + first.to(tl.int64) * seq_token)
    return past, before


@triton.jit
def taps_and_bias(weight, bias, d, d_mask, W: tl.constexpr):
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(weight + d * W + j, mask=d_mask, other=0.0).to(tl.float32),)
    shift = tl.zeros_like(taps[0])
    if bias is not None:
        shift = tl.load(bias + d, mask=d_mask, other=0.0).to(tl.float32)
    return taps, shift


@triton.jit
def weighted(rows, taps, shift, W: tl.constexpr):
    z = shift
    for j in tl.static_range(W):
        z += rows[j] * taps[j]
    return z


@triton.jit
def sigmoid(z):
    """1 / (1 + e^-z), the square of an inverse root, which costs a fraction of a quotient in time and registers.

    As exact as the quotient but for 3e-7 of the value, and 0 or 1 where that is: e^-z is infinite below z = -88.7.
    """
    root = tl.rsqrt(1.0 + tl.exp2(z * -LOG2E))
    return root * root


@kernel("short_conv", configs=forward_configs)
@triton.jit(do_not_specialize=["T"])
def short_conv_forward(
    x,
    weight,  # [D, W]
    bias,
    state,  # [B, W - 1, D], or None
    seq_idx,  # [B, T], or None
    y,  # [B, T, D]
    last,  # the new state [B, W - 1, D], or None where W is 1
    T,
    x_batch,
    x_token,
    state_batch,
    state_token,
    seq_batch,
    seq_token,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
):
    blocks: tl.constexpr = (D + BD - 1) // BD
    segments = (T + BT - 1) // BT
    segment = tl.program_id(0) // blocks
    first = (segment % segments) * BT
    b = (segment // segments).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    d_mask = d < D
    at, state_at, seq_at = b * x_batch + d, b * state_batch + d, b * seq_batch
    taps, shift = taps_and_bias(weight, bias, d, d_mask, W)
    past, before = rows_before(
        x, state, seq_idx, at, state_at, seq_at, first, d_mask, W, x_token, state_token, seq_token
    )
    for start in range(first, tl.minimum(first + BT, T), U):
        loaded = rows_from(x + at, start, T, x_token, d_mask, U)
        documents = ()
        y_row = y + (b * T + start) * D + d
        for u in tl.static_range(U):
            if seq_idx is not None:
                row = tl.cast(tl.minimum(start + u, T - 1), tl.int64)
                documents = documents + (tl.load(seq_idx + seq_at + row * seq_token),)
        for u in tl.static_range(U):
            t = start + u
            if seq_idx is not None:
                past = where_all(documents[u] == before, past, W - 1)
                before = documents[u]
            rows = past + (loaded[u].to(tl.float32),)
            z = weighted(rows, taps, shift, W)
            if SILU:
                z = z * sigmoid(z)
            tl.store(y_row + u * D, z, mask=d_mask & (t < T))
            past = rows[1:]
    if last is not None:
        if first + BT >= T:
            for i in tl.static_range(W - 1):
                row = row_before(x, state, at, state_at, T - (W - 1) + i, d_mask, W, x_token, state_token)
                tl.store(last + (b * (W - 1) + i) * D + d, row, mask=d_mask)


@triton.jit
def cotangent(rows, dy, taps, shift, W: tl.constexpr, SILU: tl.constexpr):
    """That of the sum over taps, which is computed anew where an activation follows it."""
    dz = dy.to(tl.float32)
    if SILU:
        z = weighted(rows, taps, shift, W)
        open = sigmoid(z)
        dz = dz * open * (1.0 + z * (1.0 - open))
    return dz


@triton.jit
def spread(dz, pending, valid, taps, SEQ: tl.constexpr, W: tl.constexpr):
    """Adds what row t's cotangent owes to the W - 1 rows before, and to itself."""
    grown = ()
    for j in tl.static_range(W - 1):
        if SEQ:
            grown = grown + (pending[j] + dz * (taps[j] * valid[j]),)
        else:
            grown = grown + (pending[j] + dz * taps[j],)
    return grown + (dz * taps[W - 1],)


@triton.jit
def emit(value, s, first, row, kept_row, state_row, T, d_mask, W: tl.constexpr):
    """Stores the finished gradient of token s in its row of dx, or in that of the state where s < 0.

    kept_row: where the gradient of the new state holds this token, if it does, or None.
    """
    if kept_row is not None:
        here = d_mask & (s >= T - (W - 1)) & (s < T)
        value += tl.load(kept_row, mask=here, other=0.0).to(tl.float32)
    tl.store(row, value, mask=d_mask & (s >= first) & (s < T))
    if state_row is not None:
        tl.store(state_row, value, mask=d_mask & (s < 0) & (s < T))


@kernel("short_conv", configs=backward_configs)
@triton.jit(do_not_specialize=["T"])
def short_conv_backward(
    dy,
    dlast,  # the gradient of the new state [B, W - 1, D], or None
    x,
    weight,
    bias,
    state,
    seq_idx,
    dx,  # [B, T, D]
    dstate,  # [B, W - 1, D], or None
    partial,  # [B segments, J, D] fp32: of the taps, and of the bias if there is one
    T,
    dy_batch,
    dy_token,
    x_batch,
    x_token,
    state_batch,
    state_token,
    seq_batch,
    seq_token,
    D: tl.constexpr,
    W: tl.constexpr,
    J: tl.constexpr,
    SILU: tl.constexpr,
    LENGTH: tl.constexpr,  # tokens a program: a multiple of U, at least W - 1
    U: tl.constexpr,
    BD: tl.constexpr,
):
    SEQ: tl.constexpr = seq_idx is not None
    blocks: tl.constexpr = (D + BD - 1) // BD
    segments = (T + LENGTH - 1) // LENGTH
    segment = tl.program_id(0) // blocks
    first = (segment % segments) * LENGTH
    b = (segment // segments).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    d_mask = d < D
    at, dy_at, state_at, seq_at = b * x_batch + d, b * dy_batch + d, b * state_batch + d, b * seq_batch
    taps, shift = taps_and_bias(weight, bias, d, d_mask, W)
    past, before = rows_before(
        x, state, seq_idx, at, state_at, seq_at, first, d_mask, W, x_token, state_token, seq_token
    )
    pending = ()
    valid = ()  # whether a row before this one is of its document; only rows of this program are written
    for _ in tl.static_range(W - 1):
        pending = pending + (tl.zeros((BD,), tl.float32),)
        valid = valid + ((first > 0).to(tl.float32),)
    sums = ()
    for _ in tl.static_range(J):
        sums = sums + (tl.zeros((BD,), tl.float32),)
    end = tl.minimum(first + LENGTH, T)
    dx_start = dx + b * T * D  # where token 0 of this sequence lies, or would lie
    dlast_end = None if dlast is None else dlast + (b * (W - 1) - (T - (W - 1))) * D
    dstate_end = None if dstate is None else dstate + (b * (W - 1) + W - 1) * D
    beyond = tl.minimum(end + W - 1, T)
    loaded = rows_from(x + at, first, beyond, x_token, d_mask, U)
    loaded_dy = rows_from(dy + dy_at, first, beyond, dy_token, d_mask, U)
    for start in range(first, end, U):
        coming = rows_from(x + at, start + U, beyond, x_token, d_mask, U)
        coming_dy = rows_from(dy + dy_at, start + U, beyond, dy_token, d_mask, U)
        documents = ()
        out = tl.cast(start, tl.int64) * D + d
        for u in tl.static_range(U):
            if SEQ:
                row = tl.cast(tl.minimum(start + u, T - 1), tl.int64)
                documents = documents + (tl.load(seq_idx + seq_at + row * seq_token),)
        for u in tl.static_range(U):
            t = start + u
            if SEQ:
                past = where_all(documents[u] == before, past, W - 1)
                valid = where_all(documents[u] == before, valid, W - 1)
                before = documents[u]
            rows = past + (loaded[u].to(tl.float32),)
            dz = cotangent(rows, loaded_dy[u], taps, shift, W, SILU)
            added = ()
            for j in tl.static_range(W):
                added = added + (sums[j] + dz * rows[j],)
            if J > W:
                added = added + (sums[W] + dz,)
            sums = added
            grown = spread(dz, pending, valid, taps, SEQ, W)
            s = t - (W - 1)
            kept_row = None if dlast is None else dlast_end + (out + (u - (W - 1)) * D)
            state_row = None if dstate is None else dstate_end + (out + (u - (W - 1)) * D)
            emit(grown[0], s, first, dx_start + (out + (u - (W - 1)) * D), kept_row, state_row, T, d_mask, W)
            pending = grown[1:]
            if W > 1:
                valid = valid[1:] + (first * 0.0 + 1.0,)
            past = rows[1:]
        loaded = coming
        loaded_dy = coming_dy
    for j in tl.static_range(J):
        tl.store(partial + (segment.to(tl.int64) * J + j) * D + d, sums[j], mask=d_mask)
    after = first + (end - first + U - 1) // U * U
    if W - 1 > U:
        loaded = rows_from(x + at, after, beyond, x_token, d_mask, W - 1)
        loaded_dy = rows_from(dy + dy_at, after, beyond, dy_token, d_mask, W - 1)
    for u in tl.static_range(W - 1):  # tokens of the next program, which reach back to the last of this one
        t = after + u
        if SEQ:
            here = tl.load(seq_idx + seq_at + tl.minimum(t, T - 1).to(tl.int64) * seq_token)
            past = where_all(here == before, past, W - 1)
            valid = where_all(here == before, valid, W - 1)
            before = here
        rows = past + (loaded[u].to(tl.float32),)
        dz = cotangent(rows, loaded_dy[u], taps, shift, W, SILU)
        grown = spread(dz, pending, valid, taps, SEQ, W)
        s = t - (W - 1)
        row = s.to(tl.int64) * D + d
        kept_row = None if dlast is None else dlast_end + row
        state_row = None if dstate is None else dstate_end + row
        emit(grown[0], s, first, dx_start + row, kept_row, state_row, T, d_mask, W)
        pending = grown[1:]
        valid = valid[1:] + (first * 0.0 + 1.0,)
        past = rows[1:]


@kernel("short_conv", configs=step_configs)
@triton.jit
def short_conv_token(
    x,  # [B, D] at a stride
    weight,
    bias,
    state,  # [B, W - 1, D] at strides
    y,  # [B, D]
    new_state,  # as state, and perhaps the state itself
    x_batch,
    state_batch,
    state_token,
    new_batch,
    new_token,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BD: tl.constexpr,
):
    blocks: tl.constexpr = (D + BD - 1) // BD
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    d_mask = d < D
    given = tl.load(x + b * x_batch + d, mask=d_mask, other=0.0)
    rows = ()
    for j in tl.static_range(W - 1):
        kept = tl.load(state + b * state_batch + j * state_token + d, mask=d_mask, other=0.0)
        rows = rows + (kept.to(given.dtype).to(tl.float32),)
    rows = rows + (given.to(tl.float32),)
    taps, shift = taps_and_bias(weight, bias, d, d_mask, W)
    z = weighted(rows, taps, shift, W)
    if SILU:
        z = z * sigmoid(z)
    tl.store(y + b * D + d, z, mask=d_mask)
    for j in tl.static_range(W - 1):
        tl.store(new_state + b * new_batch + j * new_token + d, rows[j + 1], mask=d_mask)
