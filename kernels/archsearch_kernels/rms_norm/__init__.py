"""RMSNorm in one pass over memory, alone, over a sum with the residual, or with a gate; and unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels import dispatch
from archsearch_kernels.eager import direct
from archsearch_kernels.rms_norm import reference
from archsearch_kernels.rows import KERNEL_DTYPES, dtype_obstacle


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Tensor:
    """x / rms(x) * weight over the last dimension (1910.07467), computed in fp32; x [..., C], weight [C] of any dtype.

    `dtype`: that of the result, by default x's. The weight's gradient has the weight's dtype.
    Raises ValueError where a shape or device does not fit x's.
    """
    _check(x, weight)
    unsupported = _obstacle(dtype, x, weight)
    if x.numel() == 0 or not dispatch.runs_kernel("rms_norm", x, unsupported, implementation):
        return reference.rms_norm(x, weight, eps, dtype=dtype)
    from archsearch_kernels.rms_norm.fused import rms_norm_op

    return direct(rms_norm_op, x, weight, None, eps, dtype or x.dtype)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of h = x + residual, both [..., C], returned as (y, h); h has the wider of both dtypes.

    `dtype`: that of y, by default x's. Raises ValueError where a shape or device does not fit x's.
    """
    _check(x, weight, "residual", residual)
    unsupported = _obstacle(dtype, x, weight, residual)
    if x.numel() == 0 or not dispatch.runs_kernel("rms_norm", x, unsupported, implementation):
        return reference.add_rms_norm(x, residual, weight, eps, dtype=dtype)
    from archsearch_kernels.rms_norm.fused import rms_norm_op

    y, h, _ = direct(rms_norm_op, x, weight, residual, eps, dtype or x.dtype)
    return y, h


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "silu",
    norm_before_gate: bool = True,
    groups: int = 1,
    *,
    implementation: str | None = None,
) -> Tensor:
    """norm(x) * act(gate), or norm(x * act(gate)) without `norm_before_gate`; in fp32, returned in x's dtype.

    x and gate [..., C], weight [C]; act is `silu` or `sigmoid`. Each of `groups` equal parts of C has its own norm.
    The first form is that of gated linear attention (2312.06635) and Qwen3-Next, the second that of Mamba-2
    (2405.21060). Raises ValueError for another activation, and where a shape or device does not fit x's.
    """
    _check(x, weight, "gate", gate)
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"activation is '{activation}'; expected silu or sigmoid")
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups is {groups}, which does not divide the last dimension of x {tuple(x.shape)}")
    unsupported = dtype_obstacle(x, gate, weight)
    if x.numel() == 0 or not dispatch.runs_kernel("gated_rms_norm", x, unsupported, implementation):
        return reference.gated_rms_norm(x, gate, weight, eps, activation, norm_before_gate, groups)
    from archsearch_kernels.rms_norm.fused import gated_rms_norm_op

    return direct(gated_rms_norm_op, x, gate, weight, eps, activation == "sigmoid", not norm_before_gate, groups)[0]


def l2_norm(
    x: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None, implementation: str | None = None
) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension, computed in fp32; x [..., C]. `dtype`: that of y, by default x's.

    The delta rule is stable for keys of length 1 only (2406.06484).
    """
    _check(x, None)
    if x.numel() == 0 or not dispatch.runs_kernel("l2_norm", x, _obstacle(dtype, x), implementation):
        return reference.l2_norm(x, eps, dtype=dtype)
    from archsearch_kernels.rms_norm.fused import even_weight, rms_norm_op

    return direct(rms_norm_op, x, even_weight(x), None, eps / x.shape[-1], dtype or x.dtype)[0]


def _obstacle(dtype: torch.dtype | None, *tensors: Tensor | None) -> str | None:
    """Why the kernels do not make `dtype` of these tensors, or None."""
    wrong = None if dtype in (None, *KERNEL_DTYPES) else f"it does not return {str(dtype)[6:]}"
    return dtype_obstacle(*tensors) or wrong


def _check(x: Tensor, weight: Tensor | None, name: str = "residual", other: Tensor | None = None) -> None:
    if x.dim() == 0:
        raise ValueError("x is a single number; expected [..., C]")
    if weight is not None and (weight.shape != x.shape[-1:] or weight.device != x.device):
        raise ValueError(
            f"weight is {tuple(weight.shape)} on {weight.device}; expected ({x.shape[-1]},) on {x.device}, as x is"
            f" {tuple(x.shape)}"
        )
    if other is not None and (other.shape != x.shape or other.device != x.device):
        raise ValueError(f"{name} is {tuple(other.shape)} on {other.device}; expected {tuple(x.shape)} on {x.device}")
