"""What the vector-gated operations (gla, kda) take: checks of shapes, and rows as kernels walk them. Without triton."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels.packing import seq_idx_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (16, 256)  # of keys and values; tiles are padded to powers of two


def check(op: str, tensors: dict[str, tuple[Tensor | None, tuple[int, ...], str]]) -> None:
    """Raise ValueError, naming the argument, for a shape other than the expected or a device other than the first's."""
    device = None
    for name, (x, shape, meaning) in tensors.items():
        if x is None:
            continue
        device = device or x.device
        if x.shape != shape:
            raise ValueError(f"{op}: {name} is {tuple(x.shape)}; expected {meaning} = {tuple(shape)}")
        if x.device != device:
            raise ValueError(f"{op}: {name} is on {x.device}, other operands on {device}")


def sizes(op: str, q: Tensor, v: Tensor, rank: int) -> tuple[tuple[int, ...], int, int]:
    """The leading sizes (..., H), K and V. Raises ValueError for another rank."""
    meaning = "[B, T, H, {}]" if rank == 4 else "[B, H, {}]"
    for name, x, dim in (("q", q, "K"), ("v", v, "V")):
        if x.dim() != rank:
            raise ValueError(f"{op}: {name} is {tuple(x.shape)}; expected {meaning.format(dim)}")
    return tuple(v.shape[:-1]), q.shape[-1], v.shape[-1]


def documents(op: str, seq_idx: Tensor | None, cu_seqlens: Tensor | None, v: Tensor) -> Tensor | None:
    """`seq_idx` [B, T], or what `cu_seqlens` says of the one row there is. ValueError for both, or other rows."""
    if cu_seqlens is None:
        return seq_idx
    if seq_idx is not None:
        raise ValueError(f"{op}: seq_idx and cu_seqlens say the same; pass one of them")
    if v.shape[0] != 1:
        raise ValueError(f"{op}: v is {tuple(v.shape)}; cu_seqlens describes a batch of 1")
    return seq_idx_of(cu_seqlens, v.shape[1])


def unsupported(q: Tensor, v: Tensor, g: Tensor) -> str | None:
    """Why the kernels do not take these operands, or None."""
    if v.dtype not in DTYPES or q.dtype not in DTYPES or g.dtype not in DTYPES:
        return f"q, v, g are {q.dtype}, {v.dtype}, {g.dtype}; it takes float32, float16 and bfloat16"
    for name, x in (("K", q), ("V", v)):
        if not DIMS[0] <= x.shape[-1] <= DIMS[1]:
            return f"{name} = {x.shape[-1]}; it takes {DIMS[0]} to {DIMS[1]}"
    return None


def step_unsupported(q: Tensor, v: Tensor, g: Tensor, state: Tensor, inplace: bool, *others: Tensor) -> str | None:
    """The same of a decode step, which has no gradient."""
    if state.dtype != torch.float32:
        return f"the state is {state.dtype}; it takes float32"
    if inplace and not state.is_contiguous():
        return "the state is not contiguous and to be written in place"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, v, g, state, *others)):
        return "a step has no gradient"
    return unsupported(q, v, g)


def rows(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, H, D] or [B, H, D] such that heads and features lie side by side, and the stride of a row."""
    D = x.shape[-1]
    if x.stride(-1) == 1 and x.stride(-2) == D and (x.dim() == 3 or x.stride(0) == x.shape[1] * x.stride(1)):
        return x, x.stride(-3)
    return x.contiguous(), x.shape[-2] * D


def heads(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x [B, T, H] such that heads lie side by side, and the stride of a row; None and 0 of None."""
    if x is None:
        return None, 0
    if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1):
        return x, x.stride(1)
    return x.contiguous(), x.shape[2]
