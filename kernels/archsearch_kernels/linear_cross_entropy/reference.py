"""Cross-entropy of the last linear layer, `F.cross_entropy(logit_scale * x @ weight.T, targets)`: the logits in full.

With the z-loss of PaLM (2204.02311): z_loss * logsumexp(logits)^2 a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    *,
    z_loss: float = 0.0,
) -> Tensor:
    """x [N, C], weight [V, C], targets [N] below V, or `ignore_index`: such rows count nothing.

    Returns, in fp32 (or wider), the mean over the rows that count, their sum, or every row's loss [N] ("none").
    """
    logits = F.linear(x, weight.to(x.dtype))  # [N, V]
    logits = logit_scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    if z_loss:
        counts = targets != ignore_index
        loss = loss + z_loss * torch.where(counts, logits.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / (targets != ignore_index).sum() if reduction == "mean" else loss.sum()
