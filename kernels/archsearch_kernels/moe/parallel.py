"""Experts over all tokens at once: static shapes, nothing waits for the device; backward without atomics.

Every product of matrices is ours or torch's grouped one, a choice by shape: ours reads a token's row where it lies and
joins gate and up in place, torch's is the faster product and wants the rows copied in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.moe.kernels.products import moe_product, moe_swiglu_product, moe_weight_grad
from archsearch_kernels.moe.kernels.rows import moe_combine, moe_gather, moe_swiglu, moe_swiglu_backward
from archsearch_kernels.moe.kernels.sorting import SORT_BLOCK, SORT_ONE, moe_count, moe_offsets, moe_place, moe_sort

# which products torch makes, added up
FIRST, DOWN, DH, DX, DW = 1, 2, 4, 8, 16
ALL = FIRST | DOWN | DH | DX | DW
MIN_ROWS = 64  # rows an expert has on average, and
MIN_FLOPS = 1e11  # work of one product, from which torch's is the default

# measured: (E, D, F, rows rounded up to a power of two)
PLANS: dict[tuple[int, int, int, int], int] = {(64, 2048, 512, 1 << 17): 0}  # 7 and 11 % faster (H200, H100)


def plan(dtype: torch.dtype, device: torch.device, M: int, E: int, D: int, F: int) -> int:
    """The products that torch makes for M rows. Its fast one takes bf16 in 16-byte steps, on Hopper.

    It runs on Blackwell too, where an expert without rows gets a gradient of garbage (pytorch #172439).
    """
    if dtype != torch.bfloat16 or D % 8 or F % 8 or device.type != "cuda":
        return 0
    if torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    known = PLANS.get((E, D, F, triton.next_power_of_2(M)))
    if known is not None:
        return known
    return ALL if M >= MIN_ROWS * E and 2.0 * M * D * F >= MIN_FLOPS else 0


def _pad(E: int) -> int:
    return max(16, triton.next_power_of_2(E))


def _precision(x: Tensor) -> str | None:
    return "tf32x3" if x.dtype == torch.float32 else None


def sort(chosen: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """order [M], place (like `chosen`) and offsets [E + 1], int32: a stable sort of the choices by expert."""
    M, E_PAD = chosen.numel(), _pad(E)
    order = chosen.new_empty(M, dtype=torch.int32)
    place = torch.empty_like(chosen, dtype=torch.int32, memory_format=torch.contiguous_format)
    offsets = chosen.new_empty(E + 1, dtype=torch.int32)
    sizes = {"M": M}
    rows = max(1, 4096 // E_PAD)
    if M <= SORT_ONE:
        arguments: dict[str, Any] = {"chosen": chosen, "offsets": offsets, "place": place, "order": order, "M": M}
        arguments |= {"E": E, "E_PAD": E_PAD, "ROWS": min(2 * rows, max(16, triton.next_power_of_2(M)))}
        moe_sort.launch(lambda c: (1,), arguments, sizes=sizes)
        return order, place, offsets
    blocks = triton.cdiv(M, SORT_BLOCK)
    counts = chosen.new_empty(2, blocks, E_PAD, dtype=torch.int32)
    fixed = {"E_PAD": E_PAD, "ROWS": min(rows, SORT_BLOCK), "BLOCK": SORT_BLOCK}
    moe_count.launch(lambda c: (blocks,), {"chosen": chosen, "counts": counts[0], "M": M, **fixed}, sizes=sizes)
    arguments = {"counts": counts[0], "offsets": offsets, "starts": counts[1], "blocks": blocks}
    moe_offsets.launch(lambda c: (1,), {**arguments, "E": E, "E_PAD": E_PAD, "ROWS": rows}, sizes=sizes)
    arguments = {"chosen": chosen, "starts": counts[1], "place": place, "order": order, "M": M}
    moe_place.launch(lambda c: (blocks,), {**arguments, **fixed}, sizes=sizes)
    return order, place, offsets


def count(chosen: Tensor, E: int) -> Tensor:
    """How often each expert was chosen [E], int64."""
    M, E_PAD = chosen.numel(), _pad(E)
    blocks = triton.cdiv(M, SORT_BLOCK)
    counts = chosen.new_empty(blocks, E_PAD, dtype=torch.int32)
    rows = min(max(1, 4096 // E_PAD), SORT_BLOCK)
    arguments = {"chosen": chosen, "counts": counts, "M": M, "E_PAD": E_PAD, "ROWS": rows, "BLOCK": SORT_BLOCK}
    moe_count.launch(lambda c: (blocks,), arguments, sizes={"M": M})
    return counts[:, :E].sum(0)


def gather(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """[M, D]: the token of each row."""
    M, D = order.numel(), x.shape[1]
    out = x.new_empty(M, D)
    arguments = {"x": x, "order": order, "out": out, "M": M, "D": D, "TOP_K": top_k}
    moe_gather.launch(lambda c: (triton.cdiv(M, c["ROWS"]), triton.cdiv(D, c["BD"])), arguments, sizes={"M": M, "D": D})
    return out


def combine(h: Tensor, h2: Tensor | None, weights: Tensor | None, place: Tensor) -> Tensor:
    """[N, D]: each token's rows of h (and h2), weighed and summed."""
    (N, k), D = place.shape, h.shape[1]
    out = h.new_empty(N, D)
    arguments = {"h": h, "h2": h2, "weights": weights, "place": place, "out": out, "N": N, "D": D, "TOP_K": k}
    moe_combine.launch(
        lambda c: (triton.cdiv(N, c["ROWS"]), triton.cdiv(D, c["BD"])), arguments, sizes={"N": N, "D": D}
    )
    return out


def product(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    library: bool,
    transposed: bool,
    order: Tensor | None = None,
    top_k: int = 1,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
) -> Tensor:
    """[M, N]: rows of a (those that `order` names) times their expert's b [E, K, N], or [E, N, K] if `transposed`.

    A second pair is added. torch takes neither that nor an order.
    """
    if library:
        assert order is None
        assert a2 is None
        return torch._grouped_mm(a, b.mT if transposed else b, offs=offsets[1:])
    E, K = b.shape[0], a.shape[1]
    N = b.shape[1] if transposed else b.shape[2]
    M = a.shape[0] if order is None else order.numel()
    out = a.new_empty(M, N)
    arguments = {
        "a": a, "order": order, "b": b, "a2": a2, "b2": b2, "out": out, "offsets": offsets, "M": M, "N": N, "K": K,
        "E": E, "E_PAD": _pad(E), "TOP_K": top_k, "B_K_LAST": transposed, "PRECISION": _precision(a),
    }  # fmt: skip
    moe_product.launch(
        lambda c: (_tiles(M, E, c["BM"]) * triton.cdiv(N, c["BN"]),), arguments, sizes={"M": M, "N": N, "K": K}
    )
    return out


def _tiles(M: int, E: int, BM: int) -> int:
    """At most so many tiles of BM rows do E experts have with M rows in all, however they share them."""
    return min(M, M // BM + E)


def weight_grad(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    library: bool,
    y_order: Tensor | None = None,
    x_order: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """[E, O, I]: the sum over an expert's rows of dy [M, O] times x [M, I], either read through an order."""
    if library:
        assert y_order is None
        assert x_order is None
        return torch._grouped_mm(dy.t(), x, offs=offsets[1:]).contiguous()
    E, O, I = offsets.numel() - 1, dy.shape[1], x.shape[1]  # noqa: E741
    M = (dy if y_order is None else y_order).shape[0]
    out = x.new_empty(E, O, I)
    arguments = {
        "dy": dy, "y_order": y_order, "x": x, "x_order": x_order, "out": out, "offsets": offsets, "M": M, "O": O,
        "I": I, "E": E, "TOP_K": top_k, "PRECISION": _precision(x),
    }  # fmt: skip
    moe_weight_grad.launch(
        lambda c: (E * triton.cdiv(O, c["BO"]) * triton.cdiv(I, c["BI"]),),
        arguments,
        sizes={"M": M, "O": O, "I": I},
    )
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) x up."""
    n, out = gate.numel(), torch.empty_like(gate)
    arguments = {"gate": gate, "up": up, "out": out, "n": n}
    moe_swiglu.launch(lambda c: (triton.cdiv(n, c["BLOCK"]),), arguments, sizes={"n": n})
    return out


@torch.library.custom_op(
    "archsearch::moe",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weights, Tensor chosen, Tensor gate_proj, Tensor up_proj, Tensor down_proj, bool "
        "keep, int library) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def moe_op(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    keep: bool,
    library: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and what the backward wants if `keep`: gate, up, the rows in order (where torch reads them), the sort."""
    E, F, D = gate_proj.shape
    k = chosen.shape[1]
    order, place, offsets = sort(chosen, E)
    M = order.numel()
    nothing = x.new_empty(0)
    gate = up = rows = nothing
    if library & FIRST:
        rows = gather(x, order, k)
        gate = product(rows, gate_proj, offsets, library=True, transposed=True)
        up = product(rows, up_proj, offsets, library=True, transposed=True)
        h = swiglu(gate, up)
    else:
        h = x.new_empty(M, F)
        if keep:
            gate, up = x.new_empty(M, F), x.new_empty(M, F)
        arguments = {
            "a": x, "order": order, "gate_proj": gate_proj, "up_proj": up_proj, "gate": gate if keep else None,
            "up": up if keep else None, "out": h, "offsets": offsets, "M": M, "N": F, "K": D, "E": E,
            "E_PAD": _pad(E), "TOP_K": k, "PRECISION": _precision(x),
        }  # fmt: skip
        moe_swiglu_product.launch(
            lambda c: (_tiles(M, E, c["BM"]) * triton.cdiv(F, c["BN"]),), arguments, sizes={"M": M, "N": F, "K": D}
        )
    h = product(h, down_proj, offsets, library=bool(library & DOWN), transposed=True)
    y = combine(h, None, weights, place)
    if not keep:
        gate = up = nothing
    if not keep or not library & DW:
        rows = nothing
    return y, gate, up if keep else x.new_empty(0), rows if rows.numel() else x.new_empty(0), order, place, offsets


@moe_op.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    keep: bool,
    library: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    E, F, D = gate_proj.shape
    M = chosen.numel()
    hidden = (M, F) if keep else (0,)
    order = chosen.new_empty(M, dtype=torch.int32)
    place = chosen.new_empty(chosen.shape, dtype=torch.int32)
    offsets = chosen.new_empty(E + 1, dtype=torch.int32)
    rows = x.new_empty((M, D) if keep and library & FIRST and library & DW else (0,))
    return torch.empty_like(x), x.new_empty(hidden), x.new_empty(hidden), rows, order, place, offsets


@torch.library.custom_op(
    "archsearch::moe_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor x, Tensor weights, Tensor gate_proj, Tensor up_proj, Tensor down_proj, Tensor "
        "gate, Tensor up, Tensor rows, Tensor order, Tensor place, Tensor offsets, bool need_x, bool "
        "need_experts, int library) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def moe_backward_op(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    gate: Tensor,
    up: Tensor,
    rows: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
    need_x: bool,
    need_experts: bool,
    library: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the routing weights and the three matrices; empty where not needed."""
    grad = grad.contiguous()
    k, (M, F) = place.shape[1], gate.shape
    copies = library & DH or (need_experts and library & DW)
    grads = gather(grad, order, k) if copies else None  # [M, D]
    if library & DH and grads is not None:
        dh = product(grads, down_proj, offsets, library=True, transposed=False)
    else:
        dh = product(grad, down_proj, offsets, library=False, transposed=False, order=order, top_k=k)
    dgate, dup, weighed = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    dweights = torch.empty_like(weights)
    arguments = {
        "gate": gate, "up": up, "dh": dh, "weights": weights, "order": order, "dgate": dgate, "dup": dup,
        "weighed": weighed, "dweights": dweights, "M": M, "F": F,
    }  # fmt: skip
    moe_swiglu_backward.launch(lambda c: (triton.cdiv(M, c["ROWS"]),), arguments, sizes={"M": M, "F": F})
    del dh
    if need_experts and library & DW and grads is not None:
        ddown = weight_grad(grads, weighed, offsets, library=True)
        grads = None
        if not rows.numel():
            rows = gather(x, order, k)
        dgate_proj = weight_grad(dgate, rows, offsets, library=True)
        dup_proj = weight_grad(dup, rows, offsets, library=True)
    elif need_experts:
        ddown = weight_grad(grad, weighed, offsets, library=False, y_order=order, top_k=k)
        dgate_proj = weight_grad(dgate, x, offsets, library=False, x_order=order, top_k=k)
        dup_proj = weight_grad(dup, x, offsets, library=False, x_order=order, top_k=k)
    else:
        ddown, dgate_proj, dup_proj = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    del weighed, grads
    if not need_x:
        dx = x.new_empty(0)
    elif library & DX:
        first = product(dgate, gate_proj, offsets, library=True, transposed=False)
        dx = combine(first, product(dup, up_proj, offsets, library=True, transposed=False), None, place)
    else:
        both = product(dgate, gate_proj, offsets, library=False, transposed=False, a2=dup, b2=up_proj)
        dx = combine(both, None, None, place)
    return dx, dweights, dgate_proj, dup_proj, ddown


@moe_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    gate: Tensor,
    up: Tensor,
    rows: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
    need_x: bool,
    need_experts: bool,
    library: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    matrices = [torch.empty_like(w) if need_experts else x.new_empty(0) for w in (gate_proj, up_proj, down_proj)]
    return torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(weights), *matrices  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, _, gate_proj, up_proj, down_proj, _, ctx.library = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weights, gate_proj, up_proj, down_proj, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    need = ctx.needs_input_grad
    experts = any(need[3:6])
    found = direct(moe_backward_op, grad, *ctx.saved_tensors, need[0], experts, ctx.library)
    dx, dweights, *matrices = found
    matrices = [m if wanted else None for m, wanted in zip(matrices, need[3:6], strict=True)]
    return dx if need[0] else None, dweights if need[1] else None, None, *matrices, None, None


moe_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(
    "archsearch::grouped_mm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor offsets, bool library) -> Tensor",
)
def grouped_mm_op(x: Tensor, weight: Tensor, offsets: Tensor, library: bool) -> Tensor:
    """[M, out] from x [M, in], weight [E, out, in], offsets [E + 1]."""
    return product(x, weight, offsets, library=library, transposed=True)


@grouped_mm_op.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, library: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op(
    "archsearch::grouped_mm_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor x, Tensor weight, Tensor offsets, bool need_x, bool need_weight, bool library) "
        "-> (Tensor, Tensor)"
    ),
)
def grouped_mm_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, need_x: bool, need_weight: bool, library: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; empty where not needed."""
    grad = grad.contiguous()
    nothing = x.new_empty(0), x.new_empty(0)
    dx = product(grad, weight, offsets, library=library, transposed=False) if need_x else nothing[0]
    return dx, weight_grad(grad, x, offsets, library=library) if need_weight else nothing[1]


@grouped_mm_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, need_x: bool, need_weight: bool, library: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(weight.shape if need_weight else (0,))


def _setup_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, ctx.library = inputs
    ctx.save_for_backward(x, weight, offsets)


def _backward_grouped(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_x, need_weight = ctx.needs_input_grad[:2]
    dx, dw = direct(grouped_mm_backward_op, grad, *ctx.saved_tensors, need_x, need_weight, ctx.library)
    return dx if need_x else None, dw if need_weight else None, None, None


grouped_mm_op.register_autograd(_backward_grouped, setup_context=_setup_grouped)
