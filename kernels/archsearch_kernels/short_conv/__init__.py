"""Causal depthwise convolution over a few tokens, with optional SiLU, and its step."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels import dispatch
from archsearch_kernels.eager import direct, direct_update
from archsearch_kernels.packing import seq_idx_of
from archsearch_kernels.rows import dtype_obstacle
from archsearch_kernels.short_conv import reference
from archsearch_kernels.short_conv.reference import short_conv_recurrent as short_conv_recurrent

MOST_TAPS = 8


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_j weight[:, j] x_{t - W + 1 + j}): the short convolution of Mamba, delta-rule layers, LFM2.

    x [B, T, D], weight [D, W], bias [D], state [B, W - 1, D] (the inputs before x; None: zeros); weight and bias may
    be wider than x. `seq_idx` [B, T] numbers packed documents, or `cu_seqlens` [N + 1] lists where those of one row
    begin and end: no tap reaches across a boundary; it excludes a state.
    Returns y [B, T, D] and the new state [B, W - 1, D]. Raises ValueError where a shape or device does not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"x is {tuple(x.shape)}; expected [B, T, D]")
    _check(x, weight, bias, state)
    B, T, _ = x.shape
    if cu_seqlens is not None:
        if seq_idx is not None or B != 1:
            raise ValueError(f"cu_seqlens wants one row and no seq_idx; x is {tuple(x.shape)}")
        seq_idx = seq_idx_of(cu_seqlens, T)
    if seq_idx is not None and (seq_idx.shape != (B, T) or seq_idx.is_floating_point() or seq_idx.device != x.device):
        raise ValueError(
            f"seq_idx is {seq_idx.dtype} {tuple(seq_idx.shape)} on {seq_idx.device}; expected integers {(B, T)} on"
            f" {x.device}"
        )
    obstacle = _obstacle(x, weight, bias, state)
    if x.numel() == 0 or not dispatch.runs_kernel("short_conv", x, obstacle, implementation):
        return reference.short_conv(x, weight, bias, silu=silu, state=state, seq_idx=seq_idx)
    from archsearch_kernels.short_conv.chunk import short_conv_op

    return direct(short_conv_op, x, weight, bias, state, seq_idx, silu)


def short_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    silu: bool = False,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token x [B, D] or [B, 1, D] after `state` [B, W - 1, D]. Returns y, shaped as x, and the new state.

    `inplace`: the new state is written into `state`, which is returned. Where gradients are asked for, `short_conv`
    computes. Raises ValueError where a shape or device does not fit.
    """
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[1] != 1):
        raise ValueError(f"x is {tuple(x.shape)}; expected [B, D] or [B, 1, D]")
    _check(x, weight, bias, state)
    obstacle = _obstacle(x, weight, bias, state)
    if inplace and state.shape[1] > 0 and state.stride(2) != 1:
        obstacle = obstacle or f"the features of the state, which is to be changed, are {state.stride(2)} numbers apart"
    if x.numel() == 0 or not dispatch.runs_kernel("short_conv_step", x, obstacle, implementation):
        return reference.short_conv_step(x, weight, bias, state, silu=silu, inplace=inplace)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, state)):
        from archsearch_kernels.short_conv.chunk import short_conv_op

        y, new_state = short_conv_op(x if x.dim() == 3 else x[:, None], weight, bias, state, None, silu)
        return y.view(x.shape), state.copy_(new_state) if inplace else new_state
    from archsearch_kernels.short_conv.step import step_inplace_op, step_op

    if inplace:
        return direct_update(step_inplace_op, state, x, weight, bias, state, silu), state
    return direct(step_op, x, weight, bias, state, silu)


def _obstacle(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> str | None:
    wrong = dtype_obstacle(x, weight, bias, state)
    if wrong is None and weight.shape[1] > MOST_TAPS:
        wrong = f"it has at most {MOST_TAPS} taps, not {weight.shape[1]}"
    return wrong


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> None:
    B, D = x.shape[0], x.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != D or weight.shape[1] == 0:
        raise ValueError(f"weight is {tuple(weight.shape)}; expected ({D}, taps), as x is {tuple(x.shape)}")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias is {tuple(bias.shape)}; expected ({D},)")
    if state is not None and state.shape != (B, weight.shape[1] - 1, D):
        raise ValueError(f"state is {tuple(state.shape)}; expected {(B, weight.shape[1] - 1, D)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("state", state)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
