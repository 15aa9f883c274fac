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
