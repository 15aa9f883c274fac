"""Cross-entropy of the last linear layer without its logits: a chunk of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels import dispatch
from archsearch_kernels.eager import direct
from archsearch_kernels.linear_cross_entropy import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    *,
    z_loss: float = 0.0,
    implementation: str | None = None,
) -> Tensor:
    """Cross-entropy of `logit_scale * x @ weight.T`, fp32, holding the logits of some rows only.

    x [N, C] and weight [V, C] in fp32, fp16 or bf16: a product is computed in x's dtype (under autocast, in its dtype),
    so `weight` may be the optimiser's fp32 copy. targets [N]: integers below V, or `ignore_index`: such rows count
    nothing; any other makes the loss NaN. reduction: "mean" over the rows that count (NaN where none does), "sum", or
    "none": losses [N]. z_loss: what the square of logsumexp is weighed with (2204.02311).
    Gradients flow to x and weight.
    Raises ValueError for shapes that do not fit, other reductions, and tensors on different devices.
    """
    _check(x, weight, targets, reduction)
    given = (ignore_index, logit_scale, reduction)
    unsupported = None
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        unsupported = f"it takes float32, float16 and bfloat16, not {x.dtype} and {weight.dtype}"
    elif x.numel() == 0:
        unsupported = "there are no rows"
    if not dispatch.runs_kernel("linear_cross_entropy", x, unsupported, implementation):
        return reference.linear_cross_entropy(x, weight, targets, *given, z_loss=z_loss)

    from archsearch_kernels.linear_cross_entropy.chunk import forward_op

    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    learns = torch.is_grad_enabled()
    need = learns and x.requires_grad, learns and weight.requires_grad
    options = (ignore_index, float(logit_scale), float(z_loss), reduction, *need)
    loss: Tensor = direct(forward_op, x, weight, targets.contiguous(), *options)[0]
    return loss


def _check(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"x is {tuple(x.shape)}; expected [N, C]")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight is {tuple(weight.shape)}; expected [V, {x.shape[1]}]")
    if targets.shape != x.shape[:1] or targets.is_floating_point():
        raise ValueError(f"targets is {targets.dtype} {tuple(targets.shape)}; expected integers [{x.shape[0]}]")
    if not x.device == weight.device == targets.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.device}, targets on {targets.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is '{reduction}'; expected mean, sum or none")
