"""Device code of SwiGLU: one tile of rows and columns a program; all that counts is wide loads in flight."""

import triton
import triton.language as tl

from archsearch_kernels.launch import kernel
from archsearch_kernels.rows.kernels import row_offset


def tiles(arguments):
    """Narrow rows share a program; of the widths the one that wastes the fewest lanes comes first."""
    columns = arguments["C"]
    width = min(max(triton.next_power_of_2(columns), 16), 1024)
    if width == 1024 and -(-columns // 512) * 512 < -(-columns // 1024) * 1024:
        width = 512
    rows = max(1, 2048 // width)
    other = 512 if width == 1024 else min(width, 512) if width < 512 else 1024
    found = [(rows, width, 4), (rows * 2, width, 8), (rows * 2, width, 4), (max(rows // 2, 1), width, 4)]
    found += [(max(rows // 2, 1), width, 2), (max(2048 // other, 1), other, 4), (max(4096 // other, 1), other, 8)]
    return [{"BR": r, "BC": c, "num_warps": w} for r, c, w in dict.fromkeys(found)]


@triton.jit
def _tile(n_rows, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Rows, columns and the mask of this program's tile; programs side by side are neighbours in memory."""
    across: tl.constexpr = (C + BC - 1) // BC
    rows = (tl.program_id(0) // across) * BR + tl.arange(0, BR)
    columns = (tl.program_id(0) % across) * BC + tl.arange(0, BC)
    return rows, columns, (rows < n_rows)[:, None] & (columns < C)[None, :]


@kernel("swiglu", configs=tiles)
@triton.jit(do_not_specialize=["n_rows"])
def swiglu_forward(
    gate,
    up,
    y,  # [n_rows, C]
    n_rows,
    gate_outer,
    gate_step,
    up_outer,
    up_step,
    C: tl.constexpr,
    INNER: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    rows, columns, mask = _tile(n_rows, C, BR, BC)
    g = tl.load(gate + row_offset(rows, gate_outer, gate_step, INNER)[:, None] + columns[None, :], mask=mask, other=0.0)
    u = tl.load(up + row_offset(rows, up_outer, up_step, INNER)[:, None] + columns[None, :], mask=mask, other=0.0)
    g = g.to(tl.float32)
    out = g * tl.sigmoid(g) * u.to(tl.float32)
    tl.store(y + rows.to(tl.int64)[:, None] * C + columns[None, :], out, mask=mask)


@kernel("swiglu", configs=tiles)
@triton.jit(do_not_specialize=["n_rows"])
def swiglu_backward(
    dy,
    gate,
    up,
    dgate,
    dup,
    n_rows,
    dy_outer,
    dy_step,
    gate_outer,
    gate_step,
    up_outer,
    up_step,
    C: tl.constexpr,
    INNER: tl.constexpr,
    OUT: tl.constexpr,  # the step between rows of dgate, and of dup: C, or 2 C where both share rows
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    rows, columns, mask = _tile(n_rows, C, BR, BC)
    g = tl.load(gate + row_offset(rows, gate_outer, gate_step, INNER)[:, None] + columns[None, :], mask=mask, other=0.0)
    u = tl.load(up + row_offset(rows, up_outer, up_step, INNER)[:, None] + columns[None, :], mask=mask, other=0.0)
    d = tl.load(dy + row_offset(rows, dy_outer, dy_step, INNER)[:, None] + columns[None, :], mask=mask, other=0.0)
    g, u, d = g.to(tl.float32), u.to(tl.float32), d.to(tl.float32)
    open = tl.sigmoid(g)
    out = rows.to(tl.int64)[:, None] * OUT + columns[None, :]
    tl.store(dgate + out, d * u * open * (1.0 + g * (1.0 - open)), mask=mask)
    tl.store(dup + out, d * g * open, mask=mask)
