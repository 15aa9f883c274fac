"""What the kernels do with a chunk: products in float32, its running decay, its documents.

Operands of large products are loaded or pass through shared memory; none is another product's result transposed or left
in registers, which triton 3.4 to 3.7.0 and their ptxas get wrong on Hopper: what is needed both ways goes to memory and
back. Sizes are never compiled in: one chunk or one head runs the code that was checked with many (docs/log.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
WEAKEST = tl.constexpr(-40.0)  # e^-40 = 4e-18: a log decay below is as good as it, and sums of 64 stay exact to 1e-4


@triton.jit
def dot(a, b):
    """a b in float32; float32 operands off the tensor cores.

    Three passes of tf32 would take operands from registers on Hopper, where ptxas up to 13.0 writes out of bounds.
    """
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def running_decay(g, first_token, length, H, C: tl.constexpr):
    """The sum of the log decays of a chunk from its start up to every token, in units of log 2: [C].

    g [B, T, H] at the head; first_token: b T + t of the chunk's start; length: its tokens.
    """
    i = tl.arange(0, C)
    if g is None:
        total = tl.zeros((C,), tl.float32)
    else:
        x = tl.load(g + first_token * H + i * H, mask=i < length, other=0.0).to(tl.float32)
        total = tl.cumsum(tl.maximum(x, WEAKEST) * LOG2E, axis=0)
    return total


@triton.jit
def at_end(x, C: tl.constexpr):
    """The last of [C]."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0.0), axis=0)


@triton.jit
def documents(seq_idx, b, start, T, C: tl.constexpr):
    """Document numbers of a chunk's tokens [C], of the token before it and of its last. The initial state belongs to
    the first token's document, tokens behind the end to the last token's."""
    at = seq_idx + b * T
    doc = tl.load(at + tl.minimum(start + tl.arange(0, C), T - 1))
    before = tl.load(at + tl.maximum(start - 1, 0))
    last = tl.load(at + tl.minimum(start + C - 1, T - 1))
    return doc, before, last


@triton.jit
def covers(index, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Which of the indices are below SIZE: all, and the compiler shall know, where SIZE is whole tiles."""
    if SIZE % TILE == 0:
        out = tl.full(index.shape, 1, tl.int1)
    else:
        out = index < SIZE
    return out


@triton.jit
def decays(log, seen, C: tl.constexpr, GATED: tl.constexpr):
    """e^{log_i - log_j} where token i has `seen` j, else 0: [C, C]."""
    if GATED:
        out = tl.exp2(tl.where(seen, log[:, None] - log[None, :], float("-inf")))
    else:
        out = tl.where(seen, 1.0, 0.0)
    return out
