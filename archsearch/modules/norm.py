"""RMSNorm inside a branch, whatever the precision of the activations."""

from __future__ import annotations

from torch import Tensor, nn

from archsearch_kernels.rms_norm import rms_norm


def apply_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """`norm(x)` computed in fp32, returned in x's dtype: under autocast x is half precision and the weight is not."""
    return rms_norm(x, norm.weight, norm.eps)  # type: ignore[arg-type]
