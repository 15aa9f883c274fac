"""The selective scan on the GPU: the operators `archsearch::selective_scan` and its backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.launch import Config, Grid
from archsearch_kernels.selective_scan.kernels import (
    selective_scan_backward,
    selective_scan_borders,
    selective_scan_forward,
    selective_scan_parts,
)

CHUNK = 32  # tokens between the states that are kept for the backward pass
CHANNELS = 32  # of a program
GROUP = 2  # tokens that a program reads at once
PROGRAMS = 8192  # that sequences are cut into parts for: about four times what a large GPU holds at a time
BLOCK = 256  # states of a program that walks over parts
SHORTEST = 128  # tokens of a part; shorter ones are more work at their borders than inside


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


def _flags(N: int) -> dict[str, int]:
    return {"N": N, "NP": triton.next_power_of_2(N), "BD": CHANNELS, "G": GROUP}


def programs(rows: int, D: int, width: int = CHANNELS) -> Grid:
    """One for each row and `width` of its channels."""

    def count(_: Config) -> tuple[int, ...]:
        return (rows * triton.cdiv(D, width),)

    return count


def cut(B: int, T: int, D: int) -> tuple[int, int]:
    """Parts of a sequence and their tokens: as many as make PROGRAMS, of whole chunks, none shorter than SHORTEST."""
    wanted = min(triton.cdiv(PROGRAMS, B * triton.cdiv(D, CHANNELS)), max(1, T // SHORTEST))
    length = CHUNK * triton.cdiv(triton.cdiv(T, wanted), CHUNK)
    return triton.cdiv(T, length), length


def _borders(
    x: Tensor,
    dt: Tensor,
    rates: Tensor,
    b: Tensor,
    seq: Tensor | None,
    first: Tensor | None,
    parts: int,
    length: int,
    reverse: bool = False,
) -> Tensor | None:
    """What every part finds [B, parts, N, D], if the first finds `first` [B, N, D]; the last, if `reverse`."""
    if parts == 1:
        return first
    (B, T, D), N = x.shape, rates.shape[0]
    decays, ends = (torch.empty((B, parts - 1, N, D), dtype=torch.float32, device=x.device) for _ in range(2))
    arguments = {
        "x": x, "dt": dt, "a": rates, "b": b, "seq": seq, "decays": decays, "ends": ends, "T": T, "D": D,
        "parts": parts, "length": length, **strides(x=x, dt=dt, b=b), **_flags(N), "REVERSE": reverse,
    }  # fmt: skip
    selective_scan_parts.launch(programs(B * (parts - 1), D), arguments, sizes={"T": T, "BD": B * D})
    found = torch.empty((B, parts, N, D), dtype=torch.float32, device=x.device)
    arguments = {
        "first": first, "decays": decays, "ends": ends, "found": found, "parts": parts, "ND": N * D,
        "BLOCK": BLOCK, "REVERSE": reverse,
    }  # fmt: skip
    selective_scan_borders.launch(programs(B, N * D, BLOCK), arguments, sizes={"BND": B * N * D})
    return found


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
    parts, length = cut(B, T, D)
    rates, seq = a.t().contiguous(), None if seq_idx is None else seq_idx.contiguous()
    first = None if initial_state is None else initial_state.contiguous()
    y = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    last = torch.empty((B, N, D), dtype=torch.float32, device=x.device)
    found = torch.empty(_kept(x, a, keep), dtype=torch.float32, device=x.device)
    arguments = {
        "x": x, "dt": dt, "a": rates, "b": b, "c": c, "seq": seq,
        "first": _borders(x, dt, rates, b, seq, first, parts, length), "y": y, "found": found if keep else None,
        "last": last, "T": T, "D": D, "parts": parts, "length": length,
        **strides(x=x, dt=dt, b=b, c=c), **_flags(N), "C": CHUNK,
    }  # fmt: skip
    selective_scan_forward.launch(programs(B * parts, D), arguments, sizes={"T": T, "BD": B * D})
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
    parts, length = cut(B, T, D)
    rates, seq = a.t().contiguous(), None if seq_idx is None else seq_idx.contiguous()
    d_last = None if d_last is None else d_last.contiguous()

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    d_x, d_dt = torch.empty((B, T, D), dtype=x.dtype, device=x.device), room(B, T, D)
    d_a, d_b, d_c, d_first = room(B, parts, N, D), room(tiles, B, T, N), room(tiles, B, T, N), room(B, N, D)
    arguments = {
        "x": x, "dt": dt, "a": rates, "b": b, "c": c, "seq": seq, "found": found, "d_y": d_y,
        "d_last": _borders(d_y, dt, rates, c, seq, d_last, parts, length, reverse=True),
        "states": room(B, parts, CHUNK // GROUP, N, D),
        "d_x": d_x, "d_dt": d_dt, "d_a": d_a, "d_b": d_b, "d_c": d_c, "d_first": d_first,
        "B": B, "T": T, "D": D, "parts": parts, "length": length,
        **strides(x=x, dt=dt, b=b, c=c, y=d_y), **_flags(N), "C": CHUNK,
    }  # fmt: skip
    selective_scan_backward.launch(programs(B * parts, D), arguments, sizes={"T": T, "BD": B * D})
    d_a = d_a.sum((0, 1)).t().to(a.dtype).contiguous()
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
