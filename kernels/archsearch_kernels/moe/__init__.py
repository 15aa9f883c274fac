"""Dropless mixture of experts: the router's choice, grouped products, SwiGLU experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from archsearch_kernels import dispatch
from archsearch_kernels.eager import direct
from archsearch_kernels.moe import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_EXPERTS = 1024
MAX_TOP_K = 32


def moe(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    implementation: str | None = None,
    products: str | None = None,
) -> Tensor:
    """y_n = sum over j of weights[n, j] x down(silu(gate x_n) x up x_n) of expert chosen[n, j]; no token is dropped.

    x [N, D]; weights [N, k] fp32; chosen [N, k] integers below E; gate_proj and up_proj [E, F, D], down_proj [E, D, F]
    in x's dtype (under autocast everything but `weights` is cast). Returns [N, D] in that dtype. Gradients flow to x,
    weights and the matrices. Nothing waits for the device, and shapes do not depend on the choice (2101.03961).
    products: "triton" or "torch" makes the products of matrices with these; by default the shape decides.
    Raises ValueError for shapes that do not fit, mixed dtypes, and tensors on different devices.
    """
    matrices = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj}
    _check_moe(x, weights, chosen, matrices)
    N, k = chosen.shape
    (E, width, D), autocast = gate_proj.shape, torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast and x.dtype != torch.float64 else x.dtype
    unsupported = None
    if dtype not in DTYPES or weights.dtype == torch.float64:
        unsupported = f"it takes float32, float16 and bfloat16, not {x.dtype} with weights in {weights.dtype}"
    elif E > MAX_EXPERTS or k > MAX_TOP_K:
        unsupported = f"it takes up to {MAX_EXPERTS} experts, {MAX_TOP_K} a token, not {E} and {k}"
    elif N * k == 0:
        unsupported = "there are no tokens"
    if not dispatch.runs_kernel("moe", x, unsupported, implementation):
        return reference.moe(x, weights, chosen, gate_proj, up_proj, down_proj)

    from archsearch_kernels.moe import parallel

    x = x.to(dtype).contiguous()
    gate_proj, up_proj, down_proj = (w.to(dtype).contiguous() for w in (gate_proj, up_proj, down_proj))
    weights, chosen = weights.contiguous(), chosen.contiguous()
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, gate_proj, up_proj, down_proj))
    plan = parallel.plan(dtype, x.device, N * k, E, D, width) if products is None else _plan(products)
    y: Tensor = direct(parallel.moe_op, x, weights, chosen, gate_proj, up_proj, down_proj, learns, plan)[0]
    return y


def grouped_mm(
    x: Tensor, weight: Tensor, counts: Tensor, *, implementation: str | None = None, products: str | None = None
) -> Tensor:
    """x [M, in], sorted by expert, times each expert's matrix [E, out, in]: [M, out].

    counts [E] integers on the device: so many rows belong to each; their sum must be M, which is not checked. Under
    autocast both operands are cast. products: as for `moe`. Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 2:
        raise ValueError(f"x is {tuple(x.shape)}; expected [M, in]")
    if weight.dim() != 3 or weight.shape[2] != x.shape[1]:
        raise ValueError(f"weight is {tuple(weight.shape)}; expected [E, out, {x.shape[1]}]")
    if counts.shape != weight.shape[:1] or counts.is_floating_point():
        raise ValueError(f"counts is {counts.dtype} {tuple(counts.shape)}; expected integers [{weight.shape[0]}]")
    if not x.device == weight.device == counts.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.device}, counts on {counts.device}")
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.dtype != weight.dtype and not autocast:
        raise ValueError(f"weight is {weight.dtype}; expected x's {x.dtype}")
    dtype = torch.get_autocast_dtype(x.device.type) if autocast and x.dtype != torch.float64 else x.dtype
    unsupported = None
    if dtype not in DTYPES:
        unsupported = f"it takes float32, float16 and bfloat16, not {x.dtype}"
    elif weight.shape[0] > MAX_EXPERTS:
        unsupported = f"it takes up to {MAX_EXPERTS} experts, not {weight.shape[0]}"
    elif x.numel() == 0:
        unsupported = "there are no rows"
    if not dispatch.runs_kernel("grouped_mm", x, unsupported, implementation):
        return reference.grouped_mm(x, weight, counts)

    from archsearch_kernels.moe import parallel

    x, weight = x.to(dtype).contiguous(), weight.to(dtype).contiguous()
    E, out, into = weight.shape
    plan = parallel.plan(dtype, x.device, x.shape[0], E, into, out) if products is None else _plan(products)
    offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    y: Tensor = direct(parallel.grouped_mm_op, x, weight, offsets, bool(plan & parallel.DOWN))
    return y


def route(
    logits: Tensor,
    top_k: int,
    routing: str = "softmax",
    bias: Tensor | None = None,
    scale: float = 1.0,
    normalize: bool = True,
    norm_eps: float | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [N, k], the chosen experts [N, k] int64 and how often each was chosen [E] int64, from logits [N, E] fp32.

    "softmax": the k largest probabilities (2101.03961). "sigmoid": sigmoids of the k for which sigmoid + bias [E] is
    largest, the bias without a gradient (2408.15664). With k > 1 and `normalize` they are divided by their sum plus
    `norm_eps`; then multiplied by `scale`. Of equals the kernel takes the first. Gradients flow from the weights to
    the logits.
    Raises ValueError for shapes that do not fit and routings that are neither.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits is {tuple(logits.shape)}; expected [N, E]")
    N, E = logits.shape
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k is {top_k}; expected 1 to {E}")
    if routing not in ("softmax", "sigmoid"):
        raise ValueError(f"routing is '{routing}'; expected softmax or sigmoid")
    if bias is not None and (bias.shape != (E,) or bias.device != logits.device):
        raise ValueError(f"bias is {tuple(bias.shape)} on {bias.device}; expected [{E}] on {logits.device}")
    unsupported = None
    if logits.dtype != torch.float32:
        unsupported = f"it takes float32 logits, not {logits.dtype}"
    elif E > MAX_EXPERTS or top_k > MAX_TOP_K:
        unsupported = f"it takes up to {MAX_EXPERTS} experts, {MAX_TOP_K} a token, not {E} and {top_k}"
    elif N == 0:
        unsupported = "there are no tokens"
    if not dispatch.runs_kernel("moe_route", logits, unsupported, implementation):
        return reference.route(logits, top_k, routing, bias, scale, normalize, norm_eps)

    from archsearch_kernels.moe.router import route_op

    bias = None if routing == "softmax" else bias
    weights, chosen, counts = direct(route_op, logits, bias, top_k, routing, float(scale))
    if top_k > 1 and (norm_eps is not None or not normalize):  # the kernel divides by the sum as it is
        scores = logits.softmax(-1) if routing == "softmax" else logits.sigmoid()
        weights = scores.gather(-1, chosen)
        if normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + (norm_eps or 0.0))
        weights = weights * scale
    return weights, chosen, counts


def _plan(products: str) -> int:
    if products not in ("triton", "torch"):
        raise ValueError(f"products is '{products}'; expected triton or torch")
    from archsearch_kernels.moe import parallel

    return parallel.ALL if products == "torch" else 0


def _check_moe(x: Tensor, weights: Tensor, chosen: Tensor, matrices: dict[str, Tensor]) -> None:
    gate = matrices["gate_proj"]
    if x.dim() != 2:
        raise ValueError(f"x is {tuple(x.shape)}; expected [N, D]")
    if chosen.dim() != 2 or chosen.shape[0] != x.shape[0] or chosen.is_floating_point():
        raise ValueError(f"chosen is {chosen.dtype} {tuple(chosen.shape)}; expected integers [{x.shape[0]}, k]")
    if weights.shape != chosen.shape:
        raise ValueError(f"weights is {tuple(weights.shape)}; expected chosen's {tuple(chosen.shape)}")
    if gate.dim() != 3 or gate.shape[2] != x.shape[1]:
        raise ValueError(f"gate_proj is {tuple(gate.shape)}; expected [E, F, {x.shape[1]}]")
    E, F_, D = gate.shape
    for name, shape in (("up_proj", (E, F_, D)), ("down_proj", (E, D, F_))):
        if matrices[name].shape != shape:
            raise ValueError(f"{name} is {tuple(matrices[name].shape)}; expected {list(shape)}")
    for name, tensor in {"weights": weights, "chosen": chosen, **matrices}.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected x's {x.device}")
    if not torch.is_autocast_enabled(x.device.type):
        for name, tensor in matrices.items():
            if tensor.dtype != x.dtype:
                raise ValueError(f"{name} is {tensor.dtype}; expected x's {x.dtype}")
