"""Host code of the short convolution: one launch forward; one backward, and one that sums the taps' gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.rows import multiprocessors
from archsearch_kernels.rows.kernels import sum_partials
from archsearch_kernels.short_conv.kernels import short_conv_backward, short_conv_forward


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
) -> dict[str, Any]:
    x = x if x.stride(2) == 1 else x.contiguous()
    state = state if state is None or state.stride(2) == 1 else state.contiguous()
    return {
        "x": x,
        "weight": weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "state": None if weight.shape[1] == 1 else state,
        "seq_idx": seq_idx,
        "x_batch": x.stride(0),
        "x_token": x.stride(1),
        "state_batch": 0 if state is None else state.stride(0),
        "state_token": 0 if state is None else state.stride(1),
        "seq_batch": 0 if seq_idx is None else seq_idx.stride(0),
        "seq_token": 0 if seq_idx is None else seq_idx.stride(1),
    }


def segment_length(B: int, T: int, D: int, device: torch.device) -> int:
    """Tokens a program of the backward: many, so that partial sums are few, but enough programs for the device."""
    length, wanted = 128, 16 * multiprocessors(device.type, device.index)
    while length > 32 and B * -(-T // length) * -(-D // 128) < wanted:
        length //= 2
    return length


@torch.library.custom_op(
    "archsearch::short_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? seq_idx, bool silu) -> (Tensor, Tensor)",
)
def short_conv_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    (B, T, D), W = x.shape, weight.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    last = torch.empty(B, W - 1, D, dtype=x.dtype, device=x.device)
    arguments = _inputs(x, weight, bias, state, seq_idx)
    arguments |= {"y": y, "last": last if W > 1 else None, "T": T, "D": D, "W": W, "SILU": silu}
    short_conv_forward.launch(lambda c: (-(-D // c["BD"]) * -(-T // c["BT"]) * B,), arguments, sizes={"T": T, "B": B})
    return y, last


@short_conv_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]))


@torch.library.custom_op(
    "archsearch::short_conv_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dlast, Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? seq_idx,"
    " bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
)
def short_conv_backward_op(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and state; empty for those of the last two that are not given."""
    (B, T, D), W, device = x.shape, weight.shape[1], x.device
    J = W + (bias is not None)
    dy = dy if dy.stride(2) == 1 else dy.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=device)
    dstate = x.new_empty(0) if state is None else torch.empty(state.shape, dtype=state.dtype, device=device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    dbias = x.new_empty(0) if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=device)
    length = segment_length(B, T, D, device)
    partial = torch.empty(B * -(-T // length), J, D, dtype=torch.float32, device=device)
    arguments = _inputs(x, weight, bias, state, seq_idx)
    arguments |= {
        "dy": dy, "dlast": None if dlast is None or W == 1 else dlast.contiguous(),
        "dx": dx, "dstate": None if state is None or W == 1 else dstate, "partial": partial,
        "T": T, "dy_batch": dy.stride(0), "dy_token": dy.stride(1),
        "D": D, "W": W, "J": J, "SILU": silu, "LENGTH": length,
    }  # fmt: skip
    short_conv_backward.launch(lambda c: (-(-D // c["BD"]) * partial.shape[0],), arguments, sizes={"T": T, "B": B})
    sum_partials.launch(
        lambda c: (-(-D // c["BD"]), J),
        {
            "partial": partial, "weight": dweight, "bias": None if bias is None else dbias,
            "P": partial.shape[0], "D": D, "J": J, "W": W,
        },
        sizes={"P": partial.shape[0]},
    )  # fmt: skip
    return dx, dweight, dbias, dstate


@short_conv_backward_op.register_fake
def _(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if state is None else state.new_empty(state.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, state, seq_idx = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dweight, dbias, dstate = direct(short_conv_backward_op, dy, dlast, x, weight, bias, state, seq_idx, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None, None


short_conv_op.register_autograd(_gradients, setup_context=_save)
