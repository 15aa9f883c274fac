"""The selective scan on the GPU: the operators `archsearch::selective_scan` and its backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.launch import Config, Grid
from archsearch_kernels.selective_scan.kernels import selective_scan_backward, selective_scan_forward

CHUNK = 64  # tokens between the states that are kept for the backward pass
CHANNELS = 32  # of a program: a thread each


def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the final state [B, N, D] in float32; shapes as in the reference."""
    y, last, _ = direct(_forward, x, dt, a, b, c, initial_state, seq_idx, torch.is_grad_enabled())
    return y, last


def rows(x: Tensor) -> Tensor:
    """With features side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """Arguments x_b, x_t of tensors x [B, T, ...], x_b alone of x [B, ...]."""
    return {f"{n}_{axis}": x.stride(i) for n, x in tensors.items() for i, axis in enumerate("bt"[: x.dim() - 1])}


def _flags(a: Tensor) -> dict[str, int]:
    N = a.shape[1]
    return {"N": N, "NP": triton.next_power_of_2(N), "BD": CHANNELS, "C": CHUNK}


def programs(B: int, D: int, width: int = CHANNELS) -> Grid:
    """One for each sequence and `width` channels."""

    def count(_: Config) -> tuple[int, ...]:
        return (B * triton.cdiv(D, width),)

    return count


def _kept(x: Tensor, a: Tensor, keep: bool) -> tuple[int, ...]:
    """Shape of the states that are kept for the backward pass."""
    B, T, D = x.shape
    return (B, triton.cdiv(T, CHUNK), a.shape[1], D) if keep else (0,)


@torch.library.custom_op(
    "archsearch::selective_scan",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? initial_state, Tensor? seq_idx, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, dt, b, c = rows(x), rows(dt), rows(b), rows(c)
    (B, T, D), N = x.shape, a.shape[1]
    y = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    last = torch.empty((B, N, D), dtype=torch.float32, device=x.device)
    found = torch.empty(_kept(x, a, keep), dtype=torch.float32, device=x.device)
    arguments = {
        "x": x, "dt": dt, "a": a.contiguous(), "b": b, "c": c,
        "seq": None if seq_idx is None else seq_idx.contiguous(),
        "first": None if initial_state is None else initial_state.contiguous(),
        "y": y, "found": found if keep else None, "last": last, "T": T, "D": D,
        **strides(x=x, dt=dt, b=b, c=c), **_flags(a),
    }  # fmt: skip
    selective_scan_forward.launch(programs(B, D), arguments, sizes={"T": T, "BD": B * D})
    return y, last, found


@_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    last = x.new_empty((x.shape[0], a.shape[1], x.shape[2]), dtype=torch.float32)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, last, x.new_empty(_kept(x, a, keep), dtype=torch.float32)


@torch.library.custom_op(
    "archsearch::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? seq_idx, Tensor found, Tensor d_y,"
    " Tensor? d_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    seq_idx: Tensor | None,
    found: Tensor,
    d_y: Tensor,
    d_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dt, b, c, d_y = rows(x), rows(dt), rows(b), rows(c), rows(d_y)
    (B, T, D), N = x.shape, a.shape[1]
    tiles = triton.cdiv(D, CHANNELS)

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    d_x, d_dt = torch.empty((B, T, D), dtype=x.dtype, device=x.device), room(B, T, D)
    d_a, d_b, d_c, d_first = room(B, N, D), room(tiles, B, T, N), room(tiles, B, T, N), room(B, N, D)
    arguments = {
        "x": x, "dt": dt, "a": a.contiguous(), "b": b, "c": c,
        "seq": None if seq_idx is None else seq_idx.contiguous(), "found": found, "d_y": d_y,
        "d_last": None if d_last is None else d_last.contiguous(), "states": room(B, CHUNK, N, D),
        "d_x": d_x, "d_dt": d_dt, "d_a": d_a, "d_b": d_b, "d_c": d_c, "d_first": d_first,
        "B": B, "T": T, "D": D, **strides(x=x, dt=dt, b=b, c=c, y=d_y), **_flags(a),
    }  # fmt: skip
    selective_scan_backward.launch(programs(B, D), arguments, sizes={"T": T, "BD": B * D})
    d_a = d_a.sum(0).t().to(a.dtype).contiguous()
    return d_x, d_dt.to(dt.dtype), d_a, d_b.sum(0).to(b.dtype), d_c.sum(0).to(c.dtype), d_first


@_backward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    seq_idx: Tensor | None,
    found: Tensor,
    d_y: Tensor,
    d_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(z: Tensor) -> Tensor:
        return torch.empty(z.shape, dtype=z.dtype, device=z.device)

    d_first = x.new_empty((x.shape[0], a.shape[1], x.shape[2]), dtype=torch.float32)
    return like(x), like(dt), like(a), like(b), like(c), d_first


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, dt, a, b, c, initial_state, seq_idx, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, dt, a, b, c, seq_idx, output[2])
    ctx.state_dtype = None if initial_state is None else initial_state.dtype


def _differentiate(
    ctx: Any, d_y: Tensor | None, d_last: Tensor | None, d_found: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, dt, a, b, c, seq_idx, found = ctx.saved_tensors  # nobody has a use for the gradient of found
    d_y = torch.zeros_like(x) if d_y is None else d_y
    *grads, d_first = direct(_backward, x, dt, a, b, c, seq_idx, found, d_y, d_last)
    return *grads, None if ctx.state_dtype is None else d_first.to(ctx.state_dtype), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
