"""One query over a cache: a program takes a split of the keys; the last to finish, or a second launch, weighs them."""

import triton
import triton.language as tl

from archsearch_kernels.attention.kernels.tiles import LN2, LOG2E, NOWHERE, _store, _tile, is_wide, width
from archsearch_kernels.launch import kernel


def step_configs(a):
    """Of splits one runs on a processor: it alone has to keep enough bytes on their way. Eight warps take 16 to 35 %
    longer (D128; docs/design/0004)."""
    if is_wide(a):
        rows = [(32, 8, 2), (16, 4, 2), (32, 4, 2), (64, 8, 2)]
    elif width(a) > 128:
        rows = [(32, 4, 4), (32, 4, 3), (64, 8, 3), (64, 4, 2)]
    elif a.get("SPLIT") and width(a) > 64:
        rows = [(64, 4, 3), (64, 4, 4), (128, 4, 2), (64, 2, 4)]
    elif a.get("SPLIT"):
        rows = [(64, 4, 4), (128, 4, 3), (64, 4, 3), (128, 8, 3), (128, 4, 2)]
    else:
        rows = [(64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3), (32, 4, 4)]
    return [{"BN": n, "num_warps": w, "num_stages": s} for n, w, s in rows]


@triton.jit
def _step_tile(
    acc, top, total, q, k, v, q_stride, k_stride, v_stride, n, end, scale2, GROUP: tl.constexpr, BH: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The queries are loaded again with each tile: loads run ahead only in loops, and the first keys would wait."""
    n64 = tl.cast(n, tl.int64)
    queries = _tile(q + (n64 >> 31), q_stride, GROUP, BH, D, BD, True)  # which is 0, but the compiler must not know
    keys = _tile(k + n64 * k_stride, k_stride, end - n, BN, D, BD, MASKED)  # [BN, D]
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BH, BN]
    if MASKED:
        s = tl.where((n + tl.arange(0, BN) < end)[None, :], s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1) * scale2)
    p = tl.exp2(s * scale2 - higher[:, None])
    kept = tl.exp2(top - higher)
    total = total * kept + tl.sum(p, 1)
    values = _tile(v + n64 * v_stride, v_stride, end - n, BN, V, BV, MASKED)  # [BN, V]
    acc = tl.dot(p.to(values.dtype), values, acc * kept[:, None], input_precision=PRECISION)
    return acc, higher, total


@triton.jit
def _merge(
    part, part_lse, sink, o, lse, heads, first_head, splits,
    GROUP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, GP: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """All splits of a group's heads and the sink, weighed into o [B, H, V] and lse [B, H] in the order of the keys."""
    j = tl.arange(0, GP)
    d = tl.arange(0, BV)
    i = tl.arange(0, BS)
    for j0 in range(0, GROUP, GP):
        real = j0 + j < GROUP
        bh = heads + j0 + j
        top = tl.full((GP,), NOWHERE, dtype=tl.float32)
        total = tl.zeros((GP,), dtype=tl.float32)
        if HAS_SINK:
            idle = tl.load(sink + first_head + j0 + j, mask=real, other=0.0).to(tl.float32) * LOG2E
            top = tl.maximum(top, idle)
            total = tl.exp2(idle - top)
        acc = tl.zeros((GP, BV), dtype=tl.float32)
        for i0 in range(0, splits, BS):
            at = bh[None, :] * splits + (i0 + i)[:, None]  # [BS, GP]
            there = real[None, :] & (i0 + i < splits)[:, None]
            mask = there[:, :, None] & (d < V)[None, None, :]
            x = tl.load(part + at[:, :, None] * V + d[None, None, :], mask=mask, other=0.0)  # [BS, GP, BV]
            sums = tl.load(part_lse + at, mask=there, other=float("-inf"))
            higher = tl.maximum(top, tl.max(sums, 0))
            weight = tl.exp2(sums - higher[None, :])
            kept = tl.exp2(top - higher)
            total = total * kept + tl.sum(weight, 0)
            acc = acc * kept[:, None] + tl.sum(x * weight[:, :, None], 0)
            top = higher
        out = o + bh[:, None] * V + d[None, :]
        acc = acc / tl.where(real, total, 1.0)[:, None]
        tl.store(out, acc.to(o.dtype.element_ty), mask=real[:, None] & (d < V)[None, :])
        tl.store(lse + bh, (top + tl.log2(total)) * LN2, mask=real)


@kernel("attention", configs=step_configs)
@triton.jit(do_not_specialize=["S", "length", "splits"])
def attention_step(
    q, k, v, sink, o, lse, part, part_lse, arrived, S, G, length, splits, scale2,
    q_b, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    GROUP: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    HAS_SINK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, BS: tl.constexpr, GP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One query of all heads of a group over `length` keys: part [B, H, splits, V] and its log2-sum, or o itself.

    arrived [B * G], or None: how many splits are in memory. Who comes last merges them, and leaves a 0.
    """
    split = tl.program_id(0)
    bg = tl.program_id(1)
    b64 = (bg // G).to(tl.int64)
    g = bg % G
    g64 = g.to(tl.int64)
    k += b64 * k_b + g64 * k_h
    v += b64 * v_b + g64 * v_h
    head = tl.arange(0, BH)
    real = head < GROUP
    q += b64 * q_b + g64 * GROUP * q_h
    acc = tl.zeros((BH, BV), dtype=tl.float32)
    top = tl.full((BH,), NOWHERE, dtype=tl.float32)
    total = tl.zeros((BH,), dtype=tl.float32)
    first = split * length
    end = tl.minimum(first + length, S)
    whole = first + (end - first) // BN * BN
    for n in range(first, whole, BN):
        acc, top, total = _step_tile(
            acc, top, total, q, k, v, q_h, k_t, v_t, n, end, scale2, GROUP, BH, D, V, BD, BV, PRECISION, False, BN
        )  # fmt: skip
    if whole < end:
        acc, top, total = _step_tile(
            acc, top, total, q, k, v, q_h, k_t, v_t, whole, end, scale2, GROUP, BH, D, V, BD, BV, PRECISION, True, BN
        )  # fmt: skip
    heads = bg.to(tl.int64) * GROUP  # of all B x H
    if SPLIT:
        _store(part + (heads * splits + split) * V, splits * V, GROUP, acc / total[:, None], BH, V, BV)
        tl.store(part_lse + (heads + head) * splits + split, top + tl.log2(total), mask=real)
        if arrived is not None:
            tl.debug_barrier()  # every thread's stores come before the one thread's release
            if tl.atomic_add(arrived + bg, 1, sem="acq_rel", scope="gpu") == splits - 1:
                _merge(part, part_lse, sink, o, lse, heads, g * GROUP, splits, GROUP, V, BV, BS, GP, HAS_SINK)
                tl.store(arrived + bg, 0)
    else:
        if HAS_SINK:
            idle = tl.load(sink + g * GROUP + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            higher = tl.maximum(top, idle)
            kept = tl.exp2(top - higher)
            total = total * kept + tl.exp2(idle - higher)
            acc = acc * kept[:, None]
            top = higher
        _store(o + heads * V, V, GROUP, acc / total[:, None], BH, V, BV)
        tl.store(lse + heads + head, (top + tl.log2(total)) * LN2, mask=real)


@kernel("attention", configs=[{"num_warps": w, "num_stages": 1} for w in (4, 2, 1, 8)])
@triton.jit(do_not_specialize=["splits"])
def attention_combine(
    part, part_lse, sink, o, lse, splits, H, V: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """The splits of one head weighed into BV columns of o [B, H, V] and lse [B, H], the sink included."""
    bh = tl.program_id(0)
    bh64 = bh.to(tl.int64)
    d = tl.program_id(1) * BV + tl.arange(0, BV)
    i = tl.arange(0, BS)
    sums = tl.load(part_lse + bh64 * splits + i, mask=i < splits, other=float("-inf"))
    top = tl.max(sums, 0)
    idle = top
    if HAS_SINK:
        idle = tl.load(sink + bh % H).to(tl.float32) * LOG2E
        top = tl.maximum(top, idle)
    weight = tl.exp2(sums - top)
    total = tl.sum(weight, 0)
    if HAS_SINK:
        total += tl.exp2(idle - top)
    at = part + bh64 * splits * V + i[:, None] * V + d[None, :]
    x = tl.load(at, mask=(i[:, None] < splits) & (d[None, :] < V), other=0.0)
    out = tl.sum(x * weight[:, None], 0) / total
    tl.store(o + bh64 * V + d, out.to(o.dtype.element_ty), mask=d < V)
    tl.store(lse + bh64, (top + tl.log2(total)) * LN2)
