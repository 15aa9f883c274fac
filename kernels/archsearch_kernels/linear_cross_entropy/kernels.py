"""Device code of the linear cross-entropy: what happens to a row of logits between two products of matrices."""

from __future__ import annotations

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


def row_configs(arguments):
    """Two reads of the row (the second from L2) in tiles, several programs an SM; or the whole row in registers."""
    whole = triton.next_power_of_2(arguments["V"])
    found = []
    for block, warps in ((8192, 8), (4096, 4), (8192, 16), (16384, 16), (16384, 8), (32768, 16), (32768, 32)):
        if warps == 32 and arguments["V"] % block:
            continue  # the masks are a few registers too many
        block = min(block, whole)
        config = {"BLOCK": block, "num_warps": max(1, min(warps, block // 256)), "num_stages": 2}
        if config not in found:
            found.append(config)
    return found


@kernel("linear_cross_entropy", configs=row_configs)
@triton.jit
def cross_entropy_rows(
    logits,  # [n, V], rows LD apart; what lies in between is read and written in whole vectors, and means nothing
    targets,  # [n] integers
    scale,  # what the gradient is multiplied by: [n], [1], or None: 1
    losses,  # [n] fp32
    dlogits,  # like logits and mostly the same memory, or None
    ignore_index,
    logit_scale: tl.constexpr,
    z_loss: tl.constexpr,
    V: tl.constexpr,
    LD: tl.constexpr,
    PER_ROW: tl.constexpr,  # scale is [n]
    BLOCK: tl.constexpr,
):
    """Loss of a row, and the gradient of scale * loss by its logits before `logit_scale`."""
    row = tl.program_id(0)
    first = row.to(tl.int64) * LD
    target = tl.load(targets + row)
    known = (target >= 0) & (target < V)
    ignored = target == ignore_index
    # before the gradients are written over the logits: the reductions below are barriers
    picked = tl.load(logits + first + tl.where(known, target, 0)).to(tl.float32) * logit_scale
    lane = tl.arange(0, BLOCK)
    highest = -float("inf")
    total = 0.0
    for begin in range(0, V, BLOCK):
        z = tl.load(logits + first + begin + lane, mask=begin + lane < LD, other=0.0).to(tl.float32)
        if V % BLOCK != 0:
            z = tl.where(begin + lane < V, z, 0.0)
        z = z * (logit_scale * LOG2E)
        if V % BLOCK != 0:
            z = tl.where(begin + lane < V, z, -float("inf"))
        higher = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(z - higher), 0)
        highest = higher
    lse2 = highest + tl.log2(total)
    lse = lse2 * LN2
    loss = lse - picked
    if z_loss != 0.0:
        loss += z_loss * lse * lse
    # a target that is no class makes the loss NaN: a kernel cannot raise
    tl.store(losses + row, tl.where(ignored, 0.0, tl.where(known, loss, float("nan"))))
    if dlogits is not None:
        factor = logit_scale
        if scale is not None:
            factor = tl.load(scale + (row if PER_ROW else 0)).to(tl.float32) * logit_scale
        slope = factor * (1.0 + 2.0 * z_loss * lse)
        for begin in range(0, V, BLOCK):
            inside = begin + lane < LD
            at = first + begin + lane
            z = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
            if V % BLOCK != 0:
                z = tl.where(begin + lane < V, z, 0.0)
            grad = tl.exp2(z * (logit_scale * LOG2E) - lse2) * slope - tl.where(begin + lane == target, factor, 0.0)
            grad = tl.where(ignored, 0.0, grad)
            tl.store(dlogits + at, grad.to(dlogits.dtype.element_ty), mask=inside)


@kernel("linear_cross_entropy", configs=[{"BLOCK": 4096, "num_warps": 8, "num_stages": 1}])
@triton.jit
def cross_entropy_count(targets, inverse, ignore_index, N, BLOCK: tl.constexpr):
    """1 / how many targets count, in one program; infinite where none does, so that their mean is NaN."""
    lane = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, N, BLOCK):
        target = tl.load(targets + begin + lane, mask=begin + lane < N, other=ignore_index)
        found += (target != ignore_index).to(tl.int32)
    count = tl.sum(found, 0)
    tl.store(inverse, tl.where(count > 0, 1.0 / tl.maximum(count, 1).to(tl.float32), float("inf")))


@kernel("linear_cross_entropy", configs=[{"BLOCK": 8192, "num_warps": 8, "num_stages": 1}])
@triton.jit
def cross_entropy_scale(gradient, by, n, BLOCK: tl.constexpr):
    """Multiply in place; nothing is touched when the factor is 1, as under `loss.backward()`."""
    factor = tl.load(by).to(tl.float32)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(gradient + at, mask=at < n)
        tl.store(gradient + at, (values.to(tl.float32) * factor).to(gradient.dtype.element_ty), mask=at < n)
