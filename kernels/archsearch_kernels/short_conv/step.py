"""Host code of one token of the short convolution: the output and the shifted state in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels.short_conv.kernels import short_conv_token


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, new_state: Tensor, silu: bool) -> Tensor:
    B, D, W = x.shape[0], x.shape[-1], weight.shape[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    short_conv_token.launch(
        lambda c: (-(-D // c["BD"]) * B,),
        {
            "x": x, "weight": weight.contiguous(), "bias": None if bias is None else bias.contiguous(),
            "state": state, "y": y, "new_state": new_state, "x_batch": x.stride(0),
            "state_batch": state.stride(0), "state_token": state.stride(1),
            "new_batch": new_state.stride(0), "new_token": new_state.stride(1),
            "D": D, "W": W, "SILU": silu,
        },
        sizes={"B": B},
    )  # fmt: skip
    return y


@torch.library.custom_op(
    "archsearch::short_conv_step",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor state, bool silu) -> (Tensor, Tensor)",
)
def step_op(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    state = state if state.stride(2) == 1 else state.contiguous()
    new_state = torch.empty(state.shape, dtype=x.dtype, device=x.device)
    return _step(x, weight, bias, state, new_state, silu), new_state


@torch.library.custom_op(
    "archsearch::short_conv_step_",
    mutates_args=("state",),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu) -> Tensor",
)
def step_inplace_op(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    return _step(x, weight, bias, state, state, silu)


@step_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(state.shape)


@step_inplace_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    return x.new_empty(x.shape)
