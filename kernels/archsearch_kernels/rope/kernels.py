"""Device code of RoPE: a program rotates some heads of some tokens, which share their sines and cosines."""
# ruff: noqa: RUF005  (Triton's tuples cannot be unpacked)

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel


def tiles(arguments):
    """Tokens and heads a program; with few tokens, few a program."""
    half = max(triton.next_power_of_2(arguments["HALF"]), 16)
    tokens = max(1, min(1024 // half, triton.next_power_of_2(arguments["rows"])))
    found = [(tokens, 4, 4), (tokens, 8, 4), (2 * tokens, 4, 8), (2 * tokens, 4, 4), (max(tokens // 2, 1), 4, 2)]
    found += [(max(tokens // 2, 1), 8, 2), (tokens, 2, 4), (2 * tokens, 2, 4)]
    return [{"BR": t, "BH": h, "num_warps": w} for t, h, w in dict.fromkeys(found)]


@triton.jit
def sine_and_cosine(angle):
    """To the last bits of fp32 for angles up to a million, where the hardware's fast instructions have lost all.

    pi / 2 is subtracted in four pieces, the first three so short that their products with a whole number of 20 bits
    are exact; then come the polynomials of Cephes on [-pi / 4, pi / 4].
    """
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - turns * 1.5
    r = r - turns * 0.0703125
    r = r - turns * 4.57763671875e-4
    r = r - turns * 2.606312302161923e-5
    z = r * r
    s = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quadrant = turns.to(tl.int32)
    odd = (quadrant & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def rotate(
    x,
    y,
    x_at,  # where the rows start [BR, 1]
    y_at,
    head_stride,
    first_head,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    sine,
    cosine,
    row_mask,
    j,
    BH: tl.constexpr,
    REST: tl.constexpr,
):
    mask = row_mask & (j < HALF)
    first, second = (), ()
    for i in tl.static_range(BH):  # all loads before the first store, behind which the compiler would leave them
        h = first_head + i
        row = x + (x_at + h.to(tl.int64) * head_stride) + j
        first = first + (tl.load(row, mask=mask & (h < H), other=0.0),)
        second = second + (tl.load(row + HALF, mask=mask & (h < H), other=0.0),)
    for i in tl.static_range(BH):
        h = first_head + i
        a, b = first[i].to(tl.float32), second[i].to(tl.float32)
        row = y + (y_at + h * D) + j
        tl.store(row, a * cosine - b * sine, mask=mask & (h < H))
        tl.store(row + HALF, b * cosine + a * sine, mask=mask & (h < H))
    if REST > 0:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        for i in tl.static_range(BH):
            h = first_head + i
            there = row_mask & (rest < D) & (h < H)
            value = tl.load(x + (x_at + h.to(tl.int64) * head_stride) + rest, mask=there, other=0.0)
            tl.store(y + (y_at + h * D) + rest, value, mask=there)


@kernel("rope", configs=tiles)
@triton.jit(do_not_specialize=["rows", "T", "position"])
def rope_rotate(
    q,  # [B, T, HQ, D] at strides
    k,  # [B, T, HK, D] at strides, or None
    out_q,  # [B, T, HQ, D]
    out_k,
    frequency,  # [HALF] fp32
    positions,  # where each sequence starts [B], or None
    rows,  # B T
    T,
    position,
    start_stride,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,  # rotate back: the gradient
    PAIR: tl.constexpr,  # HALF up to a power of two
    REST: tl.constexpr,  # D - 2 HALF up to a power of two, or 0
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    blocks_q: tl.constexpr = (HQ + BH - 1) // BH
    blocks: tl.constexpr = blocks_q + (HK + BH - 1) // BH
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks) * BR + tl.arange(0, BR)[:, None]
    j = tl.arange(0, PAIR)[None, :]
    row_mask = row < rows
    b, t = row // T, row % T
    if positions is None:
        at = position + t
    else:
        at = tl.load(positions + b * start_stride, mask=row_mask, other=0) + t
    f = tl.load(frequency + j, mask=j < HALF, other=0.0)
    sine, cosine = sine_and_cosine(at.to(tl.float32) * f)
    if BACK:
        sine = -sine
    b, t = b.to(tl.int64), t.to(tl.int64)
    if block < blocks_q:
        q_at = b * q_batch + t * q_token
        to = row.to(tl.int64) * (HQ * D)
        rotate(q, out_q, q_at, to, q_head, block * BH, HQ, D, HALF, sine, cosine, row_mask, j, BH, REST)
    elif k is not None:
        k_at = b * k_batch + t * k_token
        to = row.to(tl.int64) * (HK * D)
        rotate(k, out_k, k_at, to, k_head, (block - blocks_q) * BH, HK, D, HALF, sine, cosine, row_mask, j, BH, REST)
