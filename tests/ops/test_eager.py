"""A custom operator called directly gives what the operator gives, and steps aside where somebody watches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, outputs_and_gradients, randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from archsearch_kernels.eager import direct

CALLS: list[str] = []


@torch.library.custom_op("archsearch_tests::scaled", mutates_args=(), schema="(Tensor x, float by) -> (Tensor, Tensor)")
def scaled(x: Tensor, by: float) -> tuple[Tensor, Tensor]:
    CALLS.append("run")
    return x * by, torch.full_like(x, by)


@scaled.register_fake
def _(x: Tensor, by: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
    (by,) = ctx.saved_tensors
    assert ctx.needs_input_grad == (True, False)
    return None if grads[0] is None else direct(times, grads[0], by), None


scaled.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("archsearch_tests::times", mutates_args=(), schema="(Tensor x, Tensor y) -> Tensor")
def times(x: Tensor, y: Tensor) -> Tensor:
    return x * y


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_it_needs_of_torch_is_there() -> None:
    assert callable(scaled._init_fn)
    assert callable(scaled._backward_fn)
    assert callable(scaled._setup_context_fn)
    assert times._backward_fn is None


def test_numbers_and_gradients_are_the_operators() -> None:
    x = randn(5, 3)
    got = outputs_and_gradients(lambda x: direct(scaled, x, 3.0)[0], {"x": x})
    expected = outputs_and_gradients(lambda x: scaled(x, 3.0)[0], {"x": x})
    for name in expected:
        assert torch.equal(got[name], expected[name])
    assert "Direct_scaled" in type(direct(scaled, x.requires_grad_(), 3.0)[0].grad_fn).__name__


def test_without_gradients_the_function_alone_runs() -> None:
    x = randn(4).requires_grad_()
    with torch.no_grad():
        assert direct(scaled, x, 2.0)[0].grad_fn is None
    assert direct(scaled, x.detach(), 2.0)[0].grad_fn is None


def test_whoever_watches_sees_the_operator() -> None:
    with Watching() as mode:
        direct(scaled, randn(4), 2.0)
    assert any("scaled" in name for name in mode.seen)
    CALLS.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = direct(scaled, torch.empty(4, device=DEVICE), 2.0)[0]
    assert out.shape == (4,)
    assert CALLS == []  # the fake implementation answered


def test_compiled_code_holds_the_operator() -> None:
    x = randn(6)
    compiled = torch.compile(lambda x: direct(scaled, x, 2.0)[0] + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * x + 1)


def test_second_derivatives_are_refused() -> None:
    x = randn(4).requires_grad_()
    (first,) = torch.autograd.grad(direct(scaled, x, 2.0)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()
