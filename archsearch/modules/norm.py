"""RMSNorm inside a branch, whatever the precision of the activations."""

from __future__ import annotations

from torch import Tensor, nn


def apply_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """`norm(x)` in the precision of its weight, returned in that of x.

    Under autocast x is half precision and the weight is not; mixing them would leave torch's fused kernel, which is as
    fast as any where nothing stands beside the norm (docs/log.md).
    """
    return norm(x.to(norm.weight.dtype)).to(x.dtype)
