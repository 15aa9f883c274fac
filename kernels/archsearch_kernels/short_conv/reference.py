"""Causal depthwise convolution with optional SiLU: the short convolution of Mamba, delta-rule layers and LFM2.

y_t = act(bias + sum_j weight[:, j] x_{t - W + 1 + j}); the state is the last W - 1 inputs.
"""

from __future__ import annotations

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
        y = F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
    else:
        y = torch.zeros_like(x) if bias is None else bias.to(x.dtype).expand_as(x)
        for j in range(W):
            tap = padded[:, j : j + T]
            if seq_idx is not None and j < W - 1:
                before = F.pad(seq_idx, (W - 1 - j, 0), value=-1)[:, :T]
                tap = tap * (before == seq_idx)[..., None]
            y = y + weight[:, j].to(x.dtype) * tap
    return (F.silu(y) if silu else y), new_state


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
