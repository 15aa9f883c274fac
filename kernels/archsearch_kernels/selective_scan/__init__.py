"""The selective scan (S6) of Mamba (Gu and Dao, 2312.00752)."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels.dispatch import runs_kernel
from archsearch_kernels.eager import direct, direct_update
from archsearch_kernels.packing import seq_idx_of
from archsearch_kernels.selective_scan import reference
from archsearch_kernels.selective_scan.reference import selective_scan_recurrent as selective_scan_recurrent

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_STATES = 128


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = e^{dt_t A} h_{t-1} + dt_t B_t x_t and y_t = C_t h_t, for training and prefill, any T >= 1.

    x [B, T, D]; dt [B, T, D] step sizes > 0; a [D, N] < 0; b, c [B, T, N]; initial_state [B, N, D]. Packed documents:
    `seq_idx` [B, T] numbers them, or, for B = 1, `cu_seqlens` [N + 1] says where they begin; the initial state belongs
    to the first. chunk: of the reference, in tokens; None: 8 to 64. implementation: `auto`, `triton` or `reference`.
    The kernel takes up to 128 states a channel in float16, bfloat16 and float32, and computes in float32.
    Returns y [B, T, D] in x's dtype and the final state [B, N, D] in float32 (float64 for float64 x).
    Raises ValueError for shapes that do not fit together.
    """
    _check(x, dt, a, b, c, 3)
    (B, T, D), N = x.shape, a.shape[1]
    if initial_state is not None and initial_state.shape != (B, N, D):
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}; expected {(B, N, D)}")
    if cu_seqlens is not None:
        if seq_idx is not None or B != 1:
            raise ValueError(f"cu_seqlens goes with one row and without seq_idx; x has shape {tuple(x.shape)}")
        seq_idx = seq_idx_of(cu_seqlens, T)
    if seq_idx is not None and (seq_idx.shape != (B, T) or seq_idx.is_floating_point()):
        raise ValueError(f"seq_idx is {seq_idx.dtype} {tuple(seq_idx.shape)}; expected integers {(B, T)}")
    if runs_kernel("selective_scan", x, _unsupported(x, dt, a, b, c), implementation):
        from archsearch_kernels.selective_scan.scan import scan

        return scan(x, dt, a, b, c, initial_state, seq_idx)
    return reference.selective_scan(x, dt, a, b, c, initial_state=initial_state, seq_idx=seq_idx, chunk=chunk)


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    *,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: x, dt [B, D], a [D, N], b, c [B, N], state [B, N, D].

    Returns y [B, D] in x's dtype and the new state, which is `state` itself, written over, if `inplace`. The kernel has
    no gradient: where one is asked for, the reference runs. Raises ValueError for shapes that do not fit together.
    """
    _check(x, dt, a, b, c, 2)
    if state.shape != (x.shape[0], a.shape[1], x.shape[1]):
        raise ValueError(f"state has shape {tuple(state.shape)}; expected {(x.shape[0], a.shape[1], x.shape[1])}")
    unsupported = _unsupported(x, dt, a, b, c)
    if torch.is_grad_enabled() and any(z.requires_grad for z in (x, dt, a, b, c, state)):
        unsupported = "a single step has no gradient"
    if state.dtype == torch.float64:
        unsupported = "the state is float64"
    if inplace and not state.is_contiguous():
        unsupported = "the state to be written over is not contiguous"
    if runs_kernel("selective_scan_step", x, unsupported, implementation):
        from archsearch_kernels.selective_scan.step import step, step_inplace

        if inplace:
            return direct_update(step_inplace, state, x, dt, a, b, c, state), state
        return direct(step, x, dt, a, b, c, state)
    return reference.selective_scan_step(x, dt, a, b, c, state, inplace=inplace)


def _check(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, rank: int) -> None:
    outer = "B, T" if rank == 3 else "B"
    if x.dim() != rank or x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [{outer}, D]")
    if dt.shape != x.shape:
        raise ValueError(f"dt has shape {tuple(dt.shape)}, x {tuple(x.shape)}; they must be the same")
    if a.dim() != 2 or a.shape[0] != x.shape[-1] or a.numel() == 0:
        raise ValueError(f"a has shape {tuple(a.shape)}; expected ({x.shape[-1]}, N)")
    for name, z in (("b", b), ("c", c)):
        if z.shape != (*x.shape[:-1], a.shape[1]):
            raise ValueError(f"{name} has shape {tuple(z.shape)}; expected {(*x.shape[:-1], a.shape[1])}")
    for name, z in (("dt", dt), ("a", a), ("b", b), ("c", c)):
        if z.device != x.device:
            raise ValueError(f"{name} is on {z.device}, x on {x.device}")


def _unsupported(*tensors: Tensor) -> str | None:
    for name, z in zip(("x", "dt", "a", "b", "c"), tensors, strict=True):
        if z.dtype not in DTYPES:
            return f"{name} is {z.dtype}"
    if (states := tensors[2].shape[1]) > MAX_STATES:
        return f"{states} states a channel are more than {MAX_STATES}"
    return None
