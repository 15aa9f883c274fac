"""Log decays of a chunk, and tiles no wider than the heads.

Log decays are in base 2 and cumulated within a chunk; only differences that cannot be positive are raised. A log decay
below -40 counts as -40: 4e-18 is below any rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from archsearch_kernels.launch import Arguments, Config

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-40.0)


@triton.jit
def _cumulated(g, batch, head, start, T, H, FIXED: tl.constexpr, C: tl.constexpr):
    """Log2 decay from before the chunk to each of its tokens, flat behind the last token."""
    rows = tl.arange(0, C)
    if FIXED:
        one = tl.maximum(tl.load(g + head).to(tl.float32), LEAST) * LOG2_E
        return one * tl.minimum(rows + 1, T - start).to(tl.float32)
    each = tl.load(g + (batch * T + start) * H + head + rows * H, mask=rows < T - start, other=0.0).to(tl.float32)
    return tl.cumsum(tl.maximum(each, LEAST) * LOG2_E, axis=0)


@triton.jit
def _total(g, batch, head, start, T, H, FIXED: tl.constexpr, C: tl.constexpr):
    """Log2 decay of the whole chunk."""
    rows = tl.arange(0, C)
    if FIXED:
        one = tl.maximum(tl.load(g + head).to(tl.float32), LEAST) * LOG2_E
        return one * tl.minimum(T - start, C).to(tl.float32)
    each = tl.load(g + (batch * T + start) * H + head + rows * H, mask=rows < T - start, other=0.0).to(tl.float32)
    return tl.sum(tl.maximum(each, LEAST) * LOG2_E, axis=0)


def _of(arguments: Arguments, *configs: Config) -> Sequence[Config]:
    """The configurations whose tiles are not wider than the heads, tiles cut to them; repetitions left out."""
    widths = {"BK": arguments["KP"], "BV": arguments["VP"]}
    cut = [{n: min(x, widths.get(n, x)) for n, x in c.items()} for c in configs]
    return [c for i, c in enumerate(cut) if c not in cut[:i]]
