"""Linear cross-entropy over chunks of rows: products by the library, the rows in between by one kernel.

The gradients are made in the forward, where a chunk's logits are at hand, and multiplied by what comes in in the
backward. A backward that needs them again (a retained graph), or rows with a gradient each ("none"), computes anew.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from archsearch_kernels import launch
from archsearch_kernels.eager import direct
from archsearch_kernels.linear_cross_entropy.kernels import (
    cross_entropy_count,
    cross_entropy_rows,
    cross_entropy_scale,
)

CHUNK_BYTES = 256 << 20  # of logits, unless the matrix itself is larger
MAX_ROUNDINGS = 16  # sums in 16 bits cost less than the rounding of the logits' gradients up to here


def chunk_rows(n: int, C: int, V: int, size: int, weight_size: int) -> int:
    """Rows of a chunk: its logits take no more than CHUNK_BYTES or the matrix, and chunks are about equal."""
    most = max(CHUNK_BYTES // (V * size), C * weight_size // size, 128)
    chunks = triton.cdiv(n, most)
    return min(n, triton.cdiv(triton.cdiv(n, chunks), 128) * 128)


def aligned_parts(V: int) -> list[slice]:
    """A vocabulary for products: cuBLAS takes four times as long where a dimension is no multiple of 16 bytes, so what
    is over is multiplied apart. It comes first: what is added to it in 16 bits is rounded the least."""
    main = V if V % 8 == 0 else V // 64 * 64
    return [x for x in (slice(main, V), slice(main)) if x.start != V and x.stop]


def run(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    z_loss: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], and the gradients of sum(scale * losses) that are needed; empty tensors for the others."""
    N, C = x.shape
    V = weight.shape[0]
    x, w = x.contiguous(), weight.to(x.dtype)
    losses = x.new_empty(N, dtype=torch.float32)
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    rows = chunk_rows(N, C, V, x.element_size(), weight.element_size())
    dw = w.new_empty((V, C) if need_weight else 0, dtype=_sums_in(x.dtype, weight.dtype, triton.cdiv(N, rows)))
    width = triton.cdiv(V, 64) * 64  # aligned rows, whatever the vocabulary
    # fp16 knows nothing below 6e-8: its logits' gradients are kept as they are, the products multiplied
    later = scale if x.dtype == torch.float16 and scale is not None and scale.numel() == 1 else None
    at_once = scale if later is None else None
    per_row = scale is not None and scale.numel() == N
    buffer = x.new_empty(rows, width)
    parts = aligned_parts(V)
    for begin in range(0, N, rows):
        x_ = x[begin : begin + rows]
        n = x_.shape[0]
        logits = buffer[:n, :V]
        for part in parts:
            torch.mm(x_, w[part].t(), out=logits[:, part])
        gradients = None
        if need_x or need_weight:  # in place, but a launch that is recorded may be repeated
            gradients = torch.empty_like(buffer)[:n, :V] if launch._recorders else logits
        arguments = {
            "logits": logits,
            "targets": targets[begin : begin + n],
            "scale": at_once[begin : begin + n] if at_once is not None and per_row else at_once,
            "losses": losses[begin : begin + n],
            "dlogits": gradients,
            "ignore_index": ignore_index,
            "logit_scale": logit_scale,
            "z_loss": z_loss,
            "V": V,
            "LD": width,
            "PER_ROW": per_row,
        }
        cross_entropy_rows.launch(_programs(n), arguments, sizes={"rows": n})
        if gradients is None:
            continue
        for part in parts:
            if need_x:
                _multiply(gradients[:, part], w[part], dx[begin : begin + n], add=part is not parts[0])
            if need_weight:
                _multiply(gradients[:, part].t(), x_, dw[part], add=begin > 0)
    del buffer
    if later is not None:
        dx, dw = dx.mul_(later), dw.mul_(later)
    return losses, dx, dw.to(weight.dtype)


def _programs(n: int) -> launch.Grid:
    return lambda config: (n,)


def _sums_in(dtype: torch.dtype, weight: torch.dtype, chunks: int) -> torch.dtype:
    """In what the weights' gradient is summed over the chunks."""
    if weight == torch.float32 or dtype == torch.float32 or dtype == torch.float16 or chunks > MAX_ROUNDINGS:
        return torch.float32
    return dtype


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a b, or out += a b, where `out` may be fp32 for operands of 16 bits. No form that autocast would change."""
    if out.dtype == a.dtype:
        if add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif not a.is_cuda:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(add), out=out)
    elif not add:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    elif _adds_in_fp32(a.dtype, a.device.index):
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out.add_(torch.ops.aten.mm.dtype(a, b, out.dtype))


@cache
def _adds_in_fp32(dtype: torch.dtype, index: int) -> bool:
    """Whether this torch adds products of 16-bit matrices to an fp32 one in place."""
    a = torch.ones(16, 16, dtype=dtype, device=f"cuda:{index}")
    out = torch.ones(16, 16, device=a.device)
    try:
        torch.ops.aten.addmm.dtype_out(out, a, a, torch.float32, out=out)
    except RuntimeError:
        return False
    return True


SCHEMA = """(Tensor x, Tensor weight, Tensor targets, int ignore_index, float logit_scale, float z_loss, str reduction,
    bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)"""


@torch.library.custom_op("archsearch::linear_cross_entropy", mutates_args=(), schema=SCHEMA)
def forward_op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    logit_scale: float,
    z_loss: float,
    reduction: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, 1 / rows that count (for the mean), and the gradients of the loss unless it is one a row."""
    inverse = x.new_empty(1 if reduction == "mean" else 0, dtype=torch.float32)
    scale = None
    if reduction == "mean":
        scale = inverse
        arguments = {"targets": targets, "inverse": inverse, "ignore_index": ignore_index, "N": targets.numel()}
        cross_entropy_count.launch(lambda c: (1,), arguments, sizes={"rows": targets.numel()})
    if reduction == "none":
        need_x = need_weight = False
    found = run(x, weight, targets, scale, ignore_index, logit_scale, z_loss, need_x, need_weight)
    losses, dx, dw = found
    if reduction != "none":
        losses = losses.sum() if scale is None else (losses.sum() * scale).view(())
    return losses, inverse, dx, dw


@forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    logit_scale: float,
    z_loss: float,
    reduction: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = reduction == "none"
    return (
        x.new_empty(x.shape[0] if rows else (), dtype=torch.float32),
        x.new_empty(1 if reduction == "mean" else 0, dtype=torch.float32),
        x.new_empty(x.shape if need_x and not rows else 0),
        weight.new_empty(weight.shape if need_weight and not rows else 0),
    )


@torch.library.custom_op(
    "archsearch::linear_cross_entropy_backward",
    mutates_args=(),
    schema="""(Tensor x, Tensor weight, Tensor targets, Tensor grad, int ignore_index, float logit_scale, float z_loss,
    bool need_x, bool need_weight) -> (Tensor, Tensor)""",
)
def backward_op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad: Tensor,
    ignore_index: int,
    logit_scale: float,
    z_loss: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad * losses), grad [N] or [1], by a second look at the logits."""
    scale = grad.to(torch.float32).contiguous()
    found = run(x, weight, targets, scale, ignore_index, logit_scale, z_loss, need_x, need_weight)
    return found[1], found[2]


@backward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad: Tensor,
    ignore_index: int,
    logit_scale: float,
    z_loss: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


@torch.library.custom_op(
    "archsearch::linear_cross_entropy_scale",
    mutates_args=("gradient",),
    schema="(Tensor(a!) gradient, Tensor by) -> ()",
)
def scale_op(gradient: Tensor, by: Tensor) -> None:
    """gradient *= by, in place."""
    n = gradient.numel()
    arguments = {"gradient": gradient, "by": by, "n": n}
    cross_entropy_scale.launch(lambda c: (triton.cdiv(n, c["BLOCK"]),), arguments, sizes={"n": n})


@scale_op.register_fake
def _(gradient: Tensor, by: Tensor) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, targets, *options = inputs
    _, inverse, dx, dw = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(inverse, dx, dw)
    ctx.save_for_backward(x, weight, targets, inverse)
    ctx.options = options
    # not among the saved: they are given away, changed, by the first backward
    ctx.ready = None if options[3] == "none" else (dx, dw)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 6
    ignore_index, logit_scale, z_loss, reduction, need_x, need_weight = ctx.options
    if grad is None or not (need_x or need_weight):
        return None, None, None, *nothing
    if ctx.ready is not None:
        (dx, dw), ctx.ready = ctx.ready, None
        if type(dx) is type(grad) is Tensor:
            for gradient in (dx, dw):
                if gradient.numel():
                    direct(scale_op, gradient, grad)
        else:  # traced: what is in place in a forward and backward of one graph cannot be cut in two
            dx, dw = (dx * grad).to(dx.dtype), (dw * grad).to(dw.dtype)
    else:
        x, weight, targets, inverse = ctx.saved_tensors
        rows = grad * inverse if reduction == "mean" else grad
        if reduction == "sum":
            rows = rows.view(1)
        dx, dw = direct(backward_op, x, weight, targets, rows, ignore_index, logit_scale, z_loss, need_x, need_weight)
    return dx if need_x else None, dw if need_weight else None, None, *nothing


forward_op.register_autograd(_backward, setup_context=_setup)
