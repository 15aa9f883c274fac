"""Device code of RMSNorm: plain, of a sum with the residual, or with a gate before or after it.

Rows stay in registers from the load to the store, up to WIDEST and, backward, WIDEST_BACKWARD; wider ones are read
twice, the second time from L1 or L2. What a row needs is loaded before its sum is taken, not behind; backward, rows
to come are loaded meanwhile.
The gradient of the weight is summed per program and then over programs, in a fixed order.
"""
# ruff: noqa: RET505, RUF005  (what follows a static `return` would be compiled; Triton's tuples cannot be unpacked)

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel
from archsearch_kernels.rows.kernels import row_offset

WIDEST = 16384
WIDEST_BACKWARD = 8192
NONE, AFTER, BEFORE = 0, 1, 2  # where the gate is: nowhere, after the norm, before it


def forward_tiles(arguments):
    """Rows that fill about 2048 elements of a program, at most 32 a thread; for wide rows, columns at a time."""
    C = arguments["C"]
    if WIDEST < C:
        found = [(1, 4096, 8), (1, 2048, 8), (1, 4096, 16), (1, 2048, 4)]
    else:
        width = max(triton.next_power_of_2(C), 16)
        rows = max(1, 2048 // width)
        warps = max(4, rows * width // 1024)
        found = [(rows, width, warps), (rows, width, 2 * warps), (max(rows // 2, 1), width, warps)]
        found += [(2 * rows, width, warps), (2 * rows, width, 2 * warps)]
        found += [(max(rows // 4, 1), width, max(warps // 2, 1)), (max(rows // 2, 1), width, max(warps // 2, 1))]
        found = [(r, w, n) for r, w, n in found if r * w <= 1024 * n and n <= 16]
        if C > 8192:  # also one that reads the widest rows twice
            found.append((1, 4096, 8))
    return [{"BR": r, "BC": w, "num_warps": n} for r, w, n in dict.fromkeys(found)]


def backward_elements(C: int, gated: bool) -> int:
    """Elements, at most WIDEST_BACKWARD, that a program takes at a time: of several rows, or of one of C columns.

    Half as many where a gate makes more values live at once.
    """
    return 2048 if gated and C <= 2048 else 4096 if C <= 4096 else 8192


def backward_tiles(arguments):
    """At most 16 elements a thread: more, with the sums for the weight besides, would spill.

    Three stages keep two steps' rows on their way, within 200 kB of shared memory even for the widest rows in fp32.
    Two are slower than one: what arrives next was then asked for only one step before.
    """
    C = arguments["C"]
    elements, width = backward_elements(C, arguments["GATE"] != NONE), max(triton.next_power_of_2(C), 16)
    warps = elements // 512
    found = [(elements, warps, 3), (elements, 2 * warps, 3), (elements // 2, warps, 3), (elements // 2, warps // 2, 3)]
    found += [(elements, warps, 1), (elements // 2, warps, 1), (elements // 4, warps // 2, 3)]
    if width <= 256:  # many rows a tile: measured, H100
        found.insert(0, (elements, warps, 1) if arguments["GATE"] != NONE else (elements // 2, warps // 2, 3))
    tiles = dict.fromkeys((max(n // width, 1), w, s) for n, w, s in found)
    return [
        {"BR": r, "BC": width, "STAGES": s, "num_warps": w} for r, w, s in tiles if r * width <= 512 * w and w <= 16
    ]


@triton.jit
def activated(gate, SIGMOID: tl.constexpr):
    """The activation of the gate, and its derivative."""
    open = tl.sigmoid(gate)
    if SIGMOID:
        return open, open * (1.0 - open)
    else:
        return gate * open, open * (1.0 + gate * (1.0 - open))


@triton.jit
def input_of_norm(x, other, x_at, other_at, h_type, mask, GATE: tl.constexpr, SIGMOID: tl.constexpr):
    """What is normed, fp32: x, x + residual as it is stored, or x times the gate; `other` is residual or gate."""
    value = tl.load(x + x_at, mask=mask, other=0.0).to(tl.float32)
    if GATE == BEFORE_GATE:
        gate = tl.load(other + other_at, mask=mask, other=0.0).to(tl.float32)
        a, _ = activated(gate, SIGMOID)
        value = value * a
    elif (GATE == NO_GATE) & (other is not None):
        value = (value + tl.load(other + other_at, mask=mask, other=0.0).to(tl.float32)).to(h_type).to(tl.float32)
    return value


NO_GATE: tl.constexpr = tl.constexpr(NONE)
AFTER_GATE: tl.constexpr = tl.constexpr(AFTER)
BEFORE_GATE: tl.constexpr = tl.constexpr(BEFORE)


@kernel("rms_norm", configs=forward_tiles)
@triton.jit(do_not_specialize=["n_rows", "eps"])
def rms_norm_forward(
    x,
    other,  # the residual or the gate, or None
    weight,  # [GROUPS C] or None
    y,  # [n_rows, GROUPS C]
    h,  # the same: x + residual, or None
    rstd,  # [n_rows, GROUPS] fp32
    n_rows,
    eps,
    x_outer,
    x_step,
    other_outer,
    other_step,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    INNER: tl.constexpr,
    GATE: tl.constexpr,
    SIGMOID: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    group = tl.program_id(0) % GROUPS
    rows = (tl.program_id(0) // GROUPS) * BR + tl.arange(0, BR)
    row_mask = (rows < n_rows)[:, None]
    x_at = row_offset(rows, x_outer, x_step, INNER)[:, None] + group * C
    other_at = row_offset(rows, other_outer, other_step, INNER)[:, None] + group * C
    y_at = rows.to(tl.int64)[:, None] * (GROUPS * C) + group * C
    h_type = y.dtype.element_ty if h is None else h.dtype.element_ty
    if C <= BC:
        columns = tl.arange(0, BC)[None, :]
        mask = row_mask & (columns < C)
        value = input_of_norm(x, other, x_at + columns, other_at + columns, h_type, mask, GATE, SIGMOID)
        w = 1.0
        if weight is not None:
            w = tl.load(weight + group * C + columns, mask=columns < C, other=0.0).to(tl.float32)
        if GATE == AFTER_GATE:  # on its way before the sum over the row, behind which the compiler would leave it
            a, _ = activated(tl.load(other + other_at + columns, mask=mask, other=0.0).to(tl.float32), SIGMOID)
            w = w * a
        if h is not None:
            tl.store(h + y_at + columns, value, mask=mask)
        r = tl.rsqrt(tl.sum(value * value, axis=1) / C + eps)
        tl.store(y + y_at + columns, value * r[:, None] * w, mask=mask)
    else:
        squares = tl.zeros((BR, BC), tl.float32)
        for start in range(0, C, BC):
            columns = start + tl.arange(0, BC)[None, :]
            mask = row_mask & (columns < C)
            value = input_of_norm(x, other, x_at + columns, other_at + columns, h_type, mask, GATE, SIGMOID)
            if h is not None:
                tl.store(h + y_at + columns, value, mask=mask)
            squares += value * value
        r = tl.rsqrt(tl.sum(squares, axis=1) / C + eps)
        for start in range(0, C, BC):
            columns = start + tl.arange(0, BC)[None, :]
            mask = row_mask & (columns < C)
            value = input_of_norm(x, other, x_at + columns, other_at + columns, h_type, mask, GATE, SIGMOID)
            out = value * r[:, None]
            if weight is not None:
                out *= tl.load(weight + group * C + columns, mask=columns < C, other=0.0).to(tl.float32)
            if GATE == AFTER_GATE:
                a, _ = activated(tl.load(other + other_at + columns, mask=mask, other=0.0).to(tl.float32), SIGMOID)
                out *= a
            tl.store(y + y_at + columns, out, mask=mask)
    tl.store(rstd + rows * GROUPS + group, r, mask=rows < n_rows)


@triton.jit
def normed_and_cotangent(x, gate, dy, w, r, SIGMOID: tl.constexpr, GATE: tl.constexpr):
    """xhat, the cotangent of xhat times the weight, and what turns gradients of the normed into those of x and gate."""
    if GATE == AFTER_GATE:
        a, slope = activated(gate, SIGMOID)
        xhat = x * r
        return xhat, dy * a, dy * w * xhat * slope, 1.0
    elif GATE == BEFORE_GATE:
        a, slope = activated(gate, SIGMOID)
        return x * a * r, dy, x * slope, a
    else:
        return x * r, dy, 0.0, 1.0


@kernel("rms_norm", configs=backward_tiles)
@triton.jit(do_not_specialize=["n_rows", "programs"])
def rms_norm_backward(
    dy,
    dh,  # the gradient that reaches x + residual past the norm, or None
    x,  # what was normed (with a residual: the sum)
    gate,
    weight,
    rstd,
    dx,  # [n_rows, GROUPS C]
    dx_narrow,  # the same in another dtype, or None
    dgate,
    partial,  # [programs, GROUPS C] fp32, or None
    n_rows,
    programs,
    dy_outer,
    dy_step,
    dh_outer,
    dh_step,
    x_outer,
    x_step,
    gate_outer,
    gate_step,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    INNER: tl.constexpr,
    GATE: tl.constexpr,
    SIGMOID: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,  # the rows of STAGES - 1 steps are loaded ahead, into shared memory
):
    group = tl.program_id(0) % GROUPS
    program = tl.program_id(0) // GROUPS
    columns = tl.arange(0, BC)[None, :]
    weight_mask = columns < C
    w = 1.0
    if weight is not None:
        w = tl.load(weight + group * C + columns, mask=weight_mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BR, BC), tl.float32)
    for first in tl.range(program * BR, n_rows, programs * BR, num_stages=STAGES):
        rows = first + tl.arange(0, BR)
        mask = (rows < n_rows)[:, None] & weight_mask
        at = group * C + columns
        d = tl.load(dy + row_offset(rows, dy_outer, dy_step, INNER)[:, None] + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x + row_offset(rows, x_outer, x_step, INNER)[:, None] + at, mask=mask, other=0.0).to(tl.float32)
        g = 0.0
        if GATE != NO_GATE:
            g_at = row_offset(rows, gate_outer, gate_step, INNER)[:, None] + at
            g = tl.load(gate + g_at, mask=mask, other=0.0).to(tl.float32)
        past = 0.0
        if dh is not None:
            dh_at = row_offset(rows, dh_outer, dh_step, INNER)[:, None] + at
            past = tl.load(dh + dh_at, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + rows * GROUPS + group, mask=rows < n_rows, other=0.0)[:, None]
        xhat, u, gate_side, x_side = normed_and_cotangent(v, g, d, w, r, SIGMOID, GATE)
        if partial is not None:
            dw += u * xhat
        u = u * w
        mean = (tl.sum(u * xhat, axis=1) / C)[:, None]
        dz = r * (u - xhat * mean)
        out = rows.to(tl.int64)[:, None] * (GROUPS * C) + at
        if GATE == AFTER_GATE:
            tl.store(dgate + out, gate_side, mask=mask)
        elif GATE == BEFORE_GATE:
            tl.store(dgate + out, dz * gate_side, mask=mask)
        dz = (dz + past) * x_side
        tl.store(dx + out, dz, mask=mask)
        if dx_narrow is not None:
            tl.store(dx_narrow + out, dz, mask=mask)
    if partial is not None:
        at = program.to(tl.int64) * (GROUPS * C) + group * C + tl.arange(0, BC)
        tl.store(partial + at, tl.sum(dw, axis=0), mask=tl.arange(0, BC) < C)


def wide_pieces(arguments):
    """Columns at a time. Four a thread, and values of 16 and of 32 bits lie alike in the threads."""
    wide, narrow = (4096, 16), (2048, 16)
    is_plain = arguments["GATE"] == NONE and arguments["dh"] is None  # else there are too few registers for the wide
    first = (wide, narrow) if is_plain else (narrow, wide)
    return [{"BC": c, "num_warps": w} for c, w in (*first, (1024, 8), (2048, 8))]


@triton.jit
def piece(dy, x, gate, weight, at, mask, r, SIGMOID: tl.constexpr, GATE: tl.constexpr):
    """`normed_and_cotangent` of some columns of one row, and the weight there."""
    d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    g = 0.0
    if GATE != NO_GATE:
        g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    w = 1.0
    if weight is not None:
        w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    xhat, u, gate_side, x_side = normed_and_cotangent(v, g, d, w, r, SIGMOID, GATE)
    return xhat, u, gate_side, x_side, w


@kernel("rms_norm", configs=wide_pieces)
@triton.jit(do_not_specialize=["n_rows", "programs"])
def rms_norm_backward_wide(
    dy,
    dh,
    x,
    gate,
    weight,
    rstd,
    dx,
    dx_narrow,
    dgate,
    partial,  # [programs, GROUPS C] fp32, or None
    n_rows,
    programs,
    dy_outer,
    dy_step,
    dh_outer,
    dh_step,
    x_outer,
    x_step,
    gate_outer,
    gate_step,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    INNER: tl.constexpr,
    GATE: tl.constexpr,
    SIGMOID: tl.constexpr,
    WIDTH: tl.constexpr,  # columns whose sums for the weight a program keeps: a multiple of BC
    BC: tl.constexpr,
):
    """Rows wider than registers, in pieces: once for the mean, and again, from L1 or L2, for the gradients.

    Of rows wider than WIDTH every program writes a part, after it has read the whole.
    """
    parts: tl.constexpr = (C + WIDTH - 1) // WIDTH
    pieces: tl.constexpr = ((C if C < WIDTH else WIDTH) + BC - 1) // BC
    block = tl.program_id(0) % (GROUPS * parts)
    program = tl.program_id(0) // (GROUPS * parts)
    group = block // parts
    first_column = (block % parts) * WIDTH
    c = group * C + tl.arange(0, BC)
    end = group * C + C
    weight_row = None if weight is None else weight + c
    dw = ()
    for _ in tl.static_range(pieces):
        dw = dw + (tl.zeros((BC,), tl.float32),)
    for row in range(program, n_rows, programs):
        dy_row = dy + row_offset(row, dy_outer, dy_step, INNER) + c
        x_row = x + row_offset(row, x_outer, x_step, INNER) + c
        gate_row = None if gate is None else gate + row_offset(row, gate_outer, gate_step, INNER) + c
        dh_row = None if dh is None else dh + row_offset(row, dh_outer, dh_step, INNER) + c
        out = row.to(tl.int64) * (GROUPS * C) + c
        r = tl.load(rstd + row * GROUPS + group)
        sums = tl.zeros((BC,), tl.float32)
        for start in range(0, parts * WIDTH, WIDTH):
            for i in tl.static_range(pieces):
                at = start + i * BC
                xhat, u, gate_side, x_side, w = piece(
                    dy_row, x_row, gate_row, weight_row, at, c < end - at, r, SIGMOID, GATE
                )
                sums += u * w * xhat
        mean = tl.sum(sums) / C
        summed = ()
        for i in tl.static_range(pieces):
            at = first_column + i * BC
            mask = c < end - at
            xhat, u, gate_side, x_side, w = piece(dy_row, x_row, gate_row, weight_row, at, mask, r, SIGMOID, GATE)
            summed = summed + (dw[i] + u * xhat,)
            dz = r * (u * w - xhat * mean)
            if GATE == AFTER_GATE:
                tl.store(dgate + out + at, gate_side, mask=mask)
            elif GATE == BEFORE_GATE:
                tl.store(dgate + out + at, dz * gate_side, mask=mask)
            if dh is not None:
                dz += tl.load(dh_row + at, mask=mask, other=0.0).to(tl.float32)
            dz = dz * x_side
            tl.store(dx + out + at, dz, mask=mask)
            if dx_narrow is not None:
                tl.store(dx_narrow + out + at, dz, mask=mask)
        dw = summed
    if partial is not None:
        for i in tl.static_range(pieces):
            at = first_column + i * BC
            tl.store(partial + program.to(tl.int64) * (GROUPS * C) + c + at, dw[i], mask=c < end - at)
