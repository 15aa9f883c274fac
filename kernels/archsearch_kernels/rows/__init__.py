"""What the memory-bound operations share: rows at two strides, so that slices need no copy, and program counts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtype_obstacle(*tensors: Tensor | None) -> str | None:
    """Why the kernels do not take these tensors' dtypes, or None."""
    wrong = next((t.dtype for t in tensors if t is not None and t.dtype not in KERNEL_DTYPES), None)
    return None if wrong is None else f"it does not compute in {str(wrong)[6:]}"


def as_rows(*tensors: Tensor) -> tuple[list[Tensor], int, list[tuple[int, int]]]:
    """Tensors of one leading shape [..., *] as rows: row r of each starts at (r // inner) outer + (r % inner) step.

    Returns the tensors, `inner` and (outer, step) of each. Only what has no such strides, or a last dimension that is
    not contiguous, is copied.
    """
    if all(t.is_contiguous() for t in tensors):
        return list(tensors), 1, [(t.shape[-1], 0) for t in tensors]
    rows = [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]
    leading = rows[0].shape[:-1]
    for split in range(len(leading), 0, -1):  # all dimensions as one, then ever more of them as the inner one
        strides = [_two_strides(t, split) for t in rows]
        if all(s is not None for s in strides):
            inner = int(torch.Size(leading[split:]).numel())
            return rows, inner, [s for s in strides if s is not None]
    rows = [t.contiguous() for t in rows]
    return rows, 1, [(t.shape[-1], 0) for t in rows]


def _two_strides(tensor: Tensor, split: int) -> tuple[int, int] | None:
    shape, strides = tensor.shape[:-1], tensor.stride()[:-1]
    outer, inner = _one_stride(shape[:split], strides[:split]), _one_stride(shape[split:], strides[split:])
    return None if outer is None or inner is None else (outer, inner)


def _one_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The step between neighbours when these dimensions are walked as one; None if there is no single one."""
    step, size = 0, 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n == 1:
            continue
        if size == 1:
            step = stride
        elif stride != step * size:
            return None
        size *= n
    return step


def persistent_programs(rows: int, rows_each: int, per_multiprocessor: int, device: torch.device) -> int:
    """How many programs share `rows`: enough to fill the device, none with fewer than `rows_each`."""
    return max(1, min(-(-rows // rows_each), per_multiprocessor * multiprocessors(device.type, device.index)))


@cache
def multiprocessors(kind: str, index: int | None) -> int:
    """Of the device; what stands for one in Triton's interpreter has few, since its programs run in turn."""
    return torch.cuda.get_device_properties(index or 0).multi_processor_count if kind == "cuda" else 1
