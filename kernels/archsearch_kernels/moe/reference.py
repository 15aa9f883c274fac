"""Dropless mixture of SwiGLU experts (2101.03961, 2401.04088) and its router, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_loop(
    x: Tensor, weights: Tensor, chosen: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """The truth, one choice at a time: y_n = sum over j of weights[n, j] x expert chosen[n, j] of x_n."""
    y = []
    for n in range(x.shape[0]):
        total = torch.zeros_like(x[n], dtype=torch.promote_types(x.dtype, torch.float32))
        for j, e in enumerate(chosen[n].tolist()):
            h = F.silu(gate_proj[e] @ x[n]) * (up_proj[e] @ x[n])
            total = total + weights[n, j] * (down_proj[e] @ h)
        y.append(total)
    return torch.stack(y).to(x.dtype)


def moe(x: Tensor, weights: Tensor, chosen: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """x [N, D], weights and chosen (below E) [N, k], gate_proj and up_proj [E, F, D], down_proj [E, D, F]: y [N, D]."""
    flat = chosen.flatten()
    counts = torch.zeros(gate_proj.shape[0], dtype=torch.long, device=flat.device)
    counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.long))  # bincount would wait for the device
    order = flat.argsort(stable=True)  # choices, sorted by expert
    h = x.index_select(0, order // chosen.shape[1])  # [N k, D]
    h = F.silu(grouped_mm(h, gate_proj, counts)) * grouped_mm(h, up_proj, counts)
    h = grouped_mm(h, down_proj, counts)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    h = h.index_select(0, place).view(*chosen.shape, x.shape[1])  # [N, k, D]
    return (weights[..., None] * h).sum(1).to(h.dtype)


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [M, in], sorted by expert, times each expert's matrix [E, out, in]; counts [E] rows belong to each."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    if aligned and x.dtype != torch.float64:
        return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0).int())
    rows = torch.split(x, counts.tolist())  # what grouped_mm does not take
    return torch.cat([F.linear(r, w) for r, w in zip(rows, weight, strict=True)])


def route(
    logits: Tensor,
    top_k: int,
    routing: str = "softmax",
    bias: Tensor | None = None,
    scale: float = 1.0,
    normalize: bool = True,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [N, k], the chosen experts [N, k] and how often each was chosen [E], from logits [N, E].

    "softmax": the k largest probabilities. "sigmoid": sigmoids of the k for which sigmoid + bias [E] is largest
    (2408.15664).
    """
    if routing == "softmax":
        weights, chosen = logits.softmax(-1).topk(top_k, dim=-1)
    else:
        scores = logits.sigmoid()
        ranked = scores.detach() if bias is None else scores.detach() + bias
        chosen = ranked.topk(top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
    if normalize and top_k > 1:  # one alone keeps its score, or its router would have no gradient
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total.clamp(min=1e-20) if norm_eps is None else total + norm_eps)
    flat = chosen.flatten()
    counts = torch.zeros(logits.shape[-1], dtype=torch.long, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    return weights * scale, chosen, counts
