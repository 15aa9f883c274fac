"""Calls a custom operator without the dispatcher's detour where nobody is watching: eager mode, plain tensors.

A `torch.library.custom_op` with a Python gradient costs 100 to 200 us a call on the host, several times the kernel of a
small model. Outside torch.compile, fake tensors, dispatch modes and function transforms nothing is gained by it, so the
operator's own function runs there, under an autograd.Function made of its own gradient.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def direct(op: Any, *args: Any) -> Any:
    """`op(*args)`, all arguments by position; the same numbers and gradients at less cost."""
    if _is_watched(args):
        return op(*args)
    if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return op._init_fn(*args)
    if op._backward_fn is None:
        return op(*args)  # which refuses: what is differentiated twice here has no second derivative
    return _function(op).apply(*args)


def direct_update(op: Any, written: Tensor, *args: Any) -> Any:
    """`op(*args)` of an operator without a gradient that writes over `written`, one of its arguments."""
    if _is_watched(args):
        return op(*args)
    out = op._init_fn(*args)
    if not written.is_inference():
        torch.autograd.graph.increment_version(written)  # as the dispatcher does
    return out


def _is_watched(args: tuple[Any, ...]) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in args)
    )


_PLAIN = (Tensor, torch.nn.Parameter)


@cache
def _function(op: Any) -> Any:
    def forward(ctx: Any, *args: Any) -> Any:
        out = op._init_fn(*args)
        op._setup_context_fn(ctx=ctx, inputs=args, output=out)
        return out

    def backward(ctx: Any, *grads: Any) -> Any:
        return op._backward_fn(ctx, *grads)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Direct_{op._name}", (torch.autograd.Function,), methods)
