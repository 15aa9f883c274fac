"""Host code of SwiGLU: one launch forward, one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.rows import as_rows
from archsearch_kernels.swiglu.kernels import swiglu_backward, swiglu_forward

Rows = tuple[list[Tensor], int, list[tuple[int, int]]]  # what `as_rows` returns


def _forward(rows: Rows, y: Tensor) -> Tensor:
    C = y.shape[-1]
    n_rows = y.numel() // C
    (gate, up), inner, strides = rows
    swiglu_forward.launch(
        lambda c: (-(-n_rows // c["BR"]) * -(-C // c["BC"]),),
        {
            "gate": gate, "up": up, "y": y, "n_rows": n_rows,
            "gate_outer": strides[0][0], "gate_step": strides[0][1],
            "up_outer": strides[1][0], "up_step": strides[1][1],
            "C": C, "INNER": inner,
        },
        sizes={"rows": n_rows},
    )  # fmt: skip
    return y


def _backward(rows: Rows, dgate: Tensor, dup: Tensor, out_step: int) -> None:
    C = dgate.shape[-1]
    n_rows = dgate.numel() // C
    (dy, gate, up), inner, strides = rows
    swiglu_backward.launch(
        lambda c: (-(-n_rows // c["BR"]) * -(-C // c["BC"]),),
        {
            "dy": dy, "gate": gate, "up": up, "dgate": dgate, "dup": dup, "n_rows": n_rows,
            "dy_outer": strides[0][0], "dy_step": strides[0][1],
            "gate_outer": strides[1][0], "gate_step": strides[1][1],
            "up_outer": strides[2][0], "up_step": strides[2][1],
            "C": C, "INNER": inner, "OUT": out_step,
        },
        sizes={"rows": n_rows},
    )  # fmt: skip


def _halves(x: Tensor, *others: Tensor) -> Rows:
    """The rows of `others`, and of the two halves of x."""
    gate, up = x.chunk(2, dim=-1)
    if all(t.is_contiguous() for t in (x, *others)):  # without a search for strides
        return [*others, gate, up], 1, [*((t.shape[-1], 0) for t in others), (x.shape[-1], 0), (x.shape[-1], 0)]
    return as_rows(*others, gate, up)


@torch.library.custom_op("archsearch::swiglu", mutates_args=(), schema="(Tensor gate, Tensor up) -> Tensor")
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    return _forward(as_rows(gate, up), torch.empty(gate.shape, dtype=gate.dtype, device=gate.device))


@torch.library.custom_op(
    "archsearch::swiglu_backward", mutates_args=(), schema="(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)"
)
def swiglu_backward_op(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _backward(as_rows(dy, gate, up), dgate, dup, gate.shape[-1])
    return dgate, dup


@torch.library.custom_op("archsearch::swiglu_packed", mutates_args=(), schema="(Tensor x) -> Tensor")
def swiglu_packed_op(x: Tensor) -> Tensor:
    return _forward(_halves(x), torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device))


@torch.library.custom_op(
    "archsearch::swiglu_packed_backward", mutates_args=(), schema="(Tensor dy, Tensor x) -> Tensor"
)
def swiglu_packed_backward_op(dy: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate, dup = dx.chunk(2, dim=-1)
    _backward(_halves(x, dy), dgate, dup, x.shape[-1])
    return dx


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@swiglu_backward_op.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@swiglu_packed_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@swiglu_packed_backward_op.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return direct(swiglu_backward_op, dy, *ctx.saved_tensors)


def _gradient(ctx: Any, dy: Tensor) -> Tensor:
    return direct(swiglu_packed_backward_op, dy, *ctx.saved_tensors)


swiglu_op.register_autograd(_gradients, setup_context=_save)
swiglu_packed_op.register_autograd(_gradient, setup_context=_save)
