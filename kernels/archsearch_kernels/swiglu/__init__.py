"""silu(gate) * up in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from archsearch_kernels import dispatch
from archsearch_kernels.eager import direct
from archsearch_kernels.rows import dtype_obstacle
from archsearch_kernels.swiglu import reference


def swiglu(gate: Tensor, up: Tensor, *, implementation: str | None = None) -> Tensor:
    """silu(gate) * up (Shazeer, 2002.05202); gate and up [..., F] in one dtype. Computed in fp32 by the kernel.

    Raises ValueError if their shapes, dtypes or devices differ.
    """
    if gate.shape != up.shape or gate.dim() == 0:
        raise ValueError(f"up is {tuple(up.shape)}; expected gate's shape {tuple(gate.shape)}, [..., F]")
    if gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(f"up is {up.dtype} on {up.device}; expected gate's {gate.dtype} on {gate.device}")
    if gate.numel() == 0 or not dispatch.runs_kernel("swiglu", gate, dtype_obstacle(gate), implementation):
        return reference.swiglu(gate, up)
    from archsearch_kernels.swiglu.fused import swiglu_op

    return direct(swiglu_op, gate, up)


def swiglu_packed(x: Tensor, *, implementation: str | None = None) -> Tensor:
    """silu(x[..., :F]) * x[..., F:] for x [..., 2 F], as one projection makes it.

    Raises ValueError if the last dimension is odd.
    """
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x is {tuple(x.shape)}; expected an even last dimension, [..., 2 F]")
    if x.numel() == 0 or not dispatch.runs_kernel("swiglu", x, dtype_obstacle(x), implementation):
        return reference.swiglu_packed(x)
    from archsearch_kernels.swiglu.fused import swiglu_packed_op

    return direct(swiglu_packed_op, x)
