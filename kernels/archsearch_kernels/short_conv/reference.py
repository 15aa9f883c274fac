"""Causal depthwise convolution with optional SiLU: the short convolution of Mamba, delta-rule layers and LFM2.

y_t = act(bias + sum_j weight[:, j] x_{t - W + 1 + j}); the state is the last W - 1 inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [B, T, D], weight [D, W], bias [D], state [B, W - 1, D] (the inputs before x; None: zeros).

    `seq_idx` [B, T] numbers packed documents: no tap reaches across a boundary; it excludes a state.
    Returns y [B, T, D] and the new state [B, W - 1, D].
    """
    W, T = weight.shape[1], x.shape[1]
    if state is None:
        state = x.new_zeros(x.shape[0], W - 1, x.shape[2])
    padded = torch.cat([state.to(x.dtype), x], dim=1)  # [B, W - 1 + T, D]
    new_state = padded[:, T:]
    if seq_idx is None and T > 1:
        y = _conv(padded, weight.to(x.dtype))
        y = y if bias is None else y + bias.to(x.dtype)
    else:
        y = torch.zeros_like(x) if bias is None else bias.to(x.dtype).expand_as(x)
        for j in range(W):
            tap = padded[:, j : j + T]
            if seq_idx is not None and j < W - 1:
                before = F.pad(seq_idx, (W - 1 - j, 0), value=-1)[:, :T]
                tap = tap * (before == seq_idx)[..., None]
            y = y + weight[:, j].to(x.dtype) * tap
    return (F.silu(y) if silu else y), new_state


def short_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, silu: bool = False, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """One token x [B, D] or [B, 1, D] after `state` [B, W - 1, D]. Returns y, shaped as x, and the new state.

    `inplace`: the new state is written into `state`, which is returned.
    """
    y, new_state = short_conv(x if x.dim() == 3 else x[:, None], weight, bias, silu=silu, state=state)
    return y.view(x.shape), state.copy_(new_state) if inplace else new_state


def _conv(padded: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(padded.device.type, enabled=False):
        y: Tensor = _DepthwiseConv.apply(padded, weight)  # type: ignore[no-untyped-call]
        return y


class _DepthwiseConv(torch.autograd.Function):
    """[B, W - 1 + T, D] and taps [D, W] to [B, T, D], the features innermost throughout.

    As a convolution over images of height 1 this layout is channels-last, for which the CPU has a fast kernel: 6 times
    as fast as `F.conv1d`, which would also leave time innermost. The gradient of the taps is written out because the
    library's takes longer than all the rest.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        image = padded.transpose(1, 2)[:, :, None]  # [B, D, 1, W - 1 + T]
        return F.conv2d(image, weight[:, None, None], groups=weight.shape[0])[:, :, 0].transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        padded, weight = ctx.saved_tensors
        (dy,), T, W = grads, grads[0].shape[1], weight.shape[1]
        image = F.pad(dy, (0, 0, W - 1, W - 1)).transpose(1, 2)[:, :, None]
        dx = F.conv2d(image, weight.flip(1)[:, None, None], groups=weight.shape[0])[:, :, 0].transpose(1, 2)
        dw = [(dy * padded[:, j : j + T]).sum((0, 1)) for j in range(W)]
        return dx, torch.stack(dw, dim=1)


def short_conv_recurrent(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = False, seq_idx: Tensor | None = None
) -> Tensor:
    """The truth: one token and one tap at a time. Shapes as in `short_conv`."""
    (B, T, _), W = x.shape, weight.shape[1]
    y = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            for j in range(W):
                at = t - W + 1 + j
                if at >= 0 and (seq_idx is None or seq_idx[b, at] == seq_idx[b, t]):
                    y[b, t] += weight[:, j] * x[b, at]
            if bias is not None:
                y[b, t] += bias
    return F.silu(y) if silu else y
