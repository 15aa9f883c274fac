"""Device functions that several operations share."""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + e^x) in fp32; right to an absolute 1e-7, as log(1 + y) is for a small y."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
