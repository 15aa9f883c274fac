"""What tests/triton_interpreter.py mends in Triton's interpreter, so that the other tests can be believed."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from demo_kernels import demo_scale
from kernel_checks import DEVICE, randn

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="kernels run on the device here")


@triton.jit
def shifted(x, y, by, BLOCK: tl.constexpr):
    """y = x, read `by` elements further on."""
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + by))


@triton.jit
def arithmetic(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(2):
        total += (a * b + a).to(tl.float32) * i.to(tl.float32)
    tl.store(out + at, total.to(tl.bfloat16))


@triton.jit
def mixed(x, n, small, out, whole, M: tl.constexpr, N: tl.constexpr):
    """Operands of several types and shapes, numbers of several kinds, every one twice over."""
    row, column = tl.arange(0, M), tl.arange(0, N)
    at = row[:, None] * N + column[None, :]
    a, i, u = tl.load(x + at), tl.load(n + row), tl.load(small + column)
    for step in tl.static_range(2):
        total = a * i[:, None] + u[None, :] + (1 - a) * 1.5
        total = tl.where(total > step, total, -total) + (True + i)[:, None] / 4
        tl.store(out + at, total + (i + 1)[:, None] + (i + 1.0)[:, None] + (a.to(tl.float16) / 3).to(tl.float32))
        tl.store(whole + at, (i[:, None] // 2 + u[None, :] % 3) << 1)


@triton.jit
def minus_one(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at) + (-1))


@triton.jit
def of_two_lengths(x):
    tl.store(x + tl.arange(0, 8), tl.arange(0, 8) + tl.arange(0, 4))


def test_types_are_promoted_as_torch_does() -> None:
    x, n = randn(8, 4), torch.arange(8, dtype=torch.int16)
    small = torch.arange(250, 254, dtype=torch.uint8)
    out, whole = torch.empty(8, 4), torch.empty(8, 4, dtype=torch.int32)
    for _ in range(2):
        mixed[(1,)](x, n, small, out, whole, M=8, N=4)
        i, u = n[:, None], small[None]
        total = x * i + u + (1 - x) * 1.5
        total = torch.where(total > 1, total, -total) + (True + i) / 4
        torch.testing.assert_close(out, total + (i + 1) + (i + 1.0) + (x.half().float() / 3))
        assert torch.equal(whole, ((i.int() // 2 + u.int() % 3) << 1).int())


def test_operands_that_do_not_fit_are_refused_every_time() -> None:
    for _ in range(2):
        with pytest.raises(Exception, match="between an unsigned tensor and a negative scalar"):
            minus_one[(1,)](torch.ones(8, dtype=torch.uint8), BLOCK=8)
        with pytest.raises(Exception, match="incompatible dimensions at index 0: 8 and 4"):
            of_two_lengths[(1,)](torch.ones(8, dtype=torch.int32))


def test_reading_outside_every_argument_is_an_error() -> None:
    x, y = randn(16), torch.empty(16)
    shifted[(1,)](x, y, 0, BLOCK=16)
    assert torch.equal(x, y)
    with pytest.raises(Exception, match="load outside every argument"):
        shifted[(1,)](x, y, 2**20, BLOCK=16)
    with pytest.raises(Exception, match="store outside every argument"):
        shifted[(1,)](x, y[:8].clone(), 0, BLOCK=16)


def test_bf16_is_computed_and_rounded_as_torch_does() -> None:
    x, y = randn(64, dtype=torch.bfloat16), randn(64, seed=1, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    arithmetic[(1,)](x, y, out, BLOCK=64)
    assert torch.equal(out, x * y + x)


def test_a_kernel_may_call_helpers_and_read_constants() -> None:
    x, y = randn(5, 8), torch.empty(5, 8)
    demo_scale.fn[(1,)](x=x, y=y, T=5, D=8, BM=16, OFF=0)
    assert torch.equal(y, 2 * x)
