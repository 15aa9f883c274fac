"""A kernel for the tests of the tuner: y = a x, with configurations that are right, wrong, or never the same twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from kernel_checks import DEVICE
from torch import Tensor

from archsearch_kernels.launch import kernel
from archsearch_kernels.tuner.workload import Workload

FACTOR = tl.constexpr(2.0)
CONFIGS = [
    {"BM": 16, "OFF": 0, "num_warps": 4, "num_stages": 2},
    {"BM": 32, "OFF": 0, "num_warps": 4, "num_stages": 2},
    {"BM": 64, "OFF": 0, "num_warps": 4, "num_stages": 2},
    {"BM": 64, "OFF": 1, "num_warps": 8, "num_stages": 2},
]


@triton.jit
def scaled(x):
    return x * FACTOR


@kernel("demo", configs=CONFIGS)
@triton.jit
def demo_scale(x, y, T, D: tl.constexpr, BM: tl.constexpr, OFF: tl.constexpr):
    """y [T, D] = 2 x + OFF."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    at = rows[:, None] * D + tl.arange(0, D)[None, :]
    inside = rows[:, None] < T
    tl.store(y + at, scaled(tl.load(x + at, mask=inside)) + OFF, mask=inside)


def double(x: Tensor) -> Tensor:
    """2 x by the kernel, x [T, D]."""
    y = torch.empty_like(x)
    T, D = x.shape
    demo_scale.launch(lambda c: (triton.cdiv(T, c["BM"]),), {"x": x, "y": y, "T": T, "D": D}, sizes={"T": T})
    return y


def demo_workload(lengths: list[int]) -> Workload:
    """Run at these lengths, checked at another."""
    inputs, small = [torch.ones(T, 64, device=DEVICE) for T in lengths], torch.randn(37, 64, device=DEVICE)
    return Workload(lambda: [double(x) for x in inputs], lambda: {"y": double(small)}, lambda: {"y": 2 * small})
