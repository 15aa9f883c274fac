"""The router's choice and its gradient, a kernel each."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.moe.kernels.routing import moe_route, moe_route_backward
from archsearch_kernels.moe.parallel import count


def _shape(logits: Tensor, top_k: int, routing: str, scale: float) -> dict[str, Any]:
    N, E = logits.shape
    E_PAD = max(16, triton.next_power_of_2(E))
    return {"N": N, "scale": scale, "E": E, "E_PAD": E_PAD, "TOP_K": top_k, "SOFTMAX": routing == "softmax"}


@torch.library.custom_op(
    "archsearch::moe_route",
    mutates_args=(),
    schema="(Tensor logits, Tensor? bias, int top_k, str routing, float scale) -> (Tensor, Tensor, Tensor)",
)
def route_op(
    logits: Tensor, bias: Tensor | None, top_k: int, routing: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [N, k] fp32, the chosen [N, k] int64, how often each was [E] int64."""
    N = logits.shape[0]
    weights = logits.new_empty(N, top_k)
    chosen = logits.new_empty(N, top_k, dtype=torch.long)
    arguments = {
        "logits": logits.contiguous(), "bias": bias, "weights": weights, "chosen": chosen,
        "K_PAD": triton.next_power_of_2(top_k), **_shape(logits, top_k, routing, scale),
    }  # fmt: skip
    moe_route.launch(lambda c: (triton.cdiv(N, c["ROWS"]),), arguments, sizes={"N": N})
    return weights, chosen, count(chosen, logits.shape[1])


@route_op.register_fake
def _(logits: Tensor, bias: Tensor | None, top_k: int, routing: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    N, E = logits.shape
    chosen = logits.new_empty(N, top_k, dtype=torch.long)
    return logits.new_empty(N, top_k), chosen, logits.new_empty(E, dtype=torch.long)


@torch.library.custom_op(
    "archsearch::moe_route_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor chosen, str routing, float scale) -> Tensor",
)
def route_backward_op(grad: Tensor, logits: Tensor, chosen: Tensor, routing: str, scale: float) -> Tensor:
    """Gradient of the logits [N, E]."""
    N = logits.shape[0]
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    arguments = {
        "logits": logits.contiguous(), "chosen": chosen, "grad": grad.contiguous(), "dlogits": dlogits,
        **_shape(logits, chosen.shape[1], routing, scale),
    }  # fmt: skip
    moe_route_backward.launch(lambda c: (triton.cdiv(N, c["ROWS"]),), arguments, sizes={"N": N})
    return dlogits


@route_backward_op.register_fake
def _(grad: Tensor, logits: Tensor, chosen: Tensor, routing: str, scale: float) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, _, ctx.routing, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, output[1])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    dlogits = None if grad is None else direct(route_backward_op, grad, *ctx.saved_tensors, ctx.routing, ctx.scale)
    return dlogits, None, None, None, None


route_op.register_autograd(_backward, setup_context=_setup)
